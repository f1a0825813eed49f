"""The logits processor: plain `model.generate()` under the same control, greedy, sampled and with beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt.demo.load import demo_model
from qwenopt.demo.task import unseen_questions
from qwenopt.runtime.sample import SamplingParams
from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.runtime.thinking_exits import MarginRule, ProbeRule
from qwenopt.runtime.thinking_processor import ThinkingLogitsProcessor
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.testing.scripted import ScriptedLM, play
from qwenopt.testing.thinking_oracle import Oracle, Text

NEW = 75


@pytest.fixture(scope="module")
def demo() -> Any:
    return demo_model("dense", torch.float32)


def padded(tokenizer: Any, count: int) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    rows = []
    for question in unseen_questions(count):
        chat = [{"role": "user", "content": question.text}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        rows.append(list(tokenizer.encode(text, add_special_tokens=False)))
    width = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask, rows


def reply(ids: list[int], eos: tuple[int, ...]) -> list[int]:
    """Up to the end of the text."""
    stop = next((i for i, token in enumerate(ids) if token in eos), len(ids) - 1)
    return ids[: stop + 1]


def check(
    processor: Any, out: torch.Tensor, width: int, configs: list[Any], prompts: list[list[int]], text: Text
) -> None:
    """Each reply is what the oracle makes of it: forced tokens at their places, and the same counts."""
    tokens = processor.tokens
    for row, (ids, config, prompt) in enumerate(zip(out.tolist(), configs, prompts, strict=True)):
        oracle = Oracle(config, tokens, text, prompt, NEW)
        for i, token in enumerate(reply(ids[width:], tokens.eos)):
            assert oracle.step(token) == token, f"row {row}, token {i}"
        assert processor.stats()[row] == oracle.stats()


CONFIGS = [ThinkingConfig(12), ThinkingConfig(0), ThinkingConfig(), ThinkingConfig(30, boundary="newline", window=20)]


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_k": 50}], ids=str)
def test_generate_with_one_config_each(demo: Any, text: Text, given: dict[str, Any]) -> None:
    model, tokenizer = demo
    ids, mask, rows = padded(tokenizer, 4)
    processor = ThinkingLogitsProcessor(
        tokenizer, CONFIGS, max_new_tokens=NEW, eos_token_id=model.generation_config.eos_token_id
    )
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, logits_processor=[processor], **given)
    processor.stats(out)
    check(processor, out, ids.shape[1], CONFIGS, rows, text)
    reasons = [stats.reason for stats in processor.stats()]
    assert reasons[0] == "budget"
    assert reasons[1] == "disabled"
    assert reasons[3] in ("window", "budget", "natural")


def test_greedy_equals_the_state_in_a_loop(demo: Any) -> None:
    """Token by token what `ThinkingState` gives with the same logits."""
    model, tokenizer = demo
    ids, mask, rows = padded(tokenizer, 1)
    config = ThinkingConfig(10, min_tokens=4, min_action="wait")
    processor = ThinkingLogitsProcessor(tokenizer, config, eos_token_id=model.generation_config.eos_token_id)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, logits_processor=[processor],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    state = ThinkingState(1, processor.tokens)
    done = play(state, [config], rows, lambda step: out.logits[step].clone(), len(out.logits))
    assert done.ids[0] == out.sequences[0, ids.shape[1] :].tolist()
    assert done.stats == processor.stats(out.sequences)


@pytest.mark.slow
def test_t20_beams_have_budgets_of_their_own(demo: Any, text: Text) -> None:
    model, tokenizer = demo
    ids, mask, rows = padded(tokenizer, 2)
    for beams in (2, 4):
        processor = ThinkingLogitsProcessor(tokenizer, 9, eos_token_id=model.generation_config.eos_token_id)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, num_beams=beams, do_sample=False,
            num_return_sequences=beams, logits_processor=[processor],
        )  # fmt: skip
        tokens = processor.tokens
        for row, found in enumerate(out[:, ids.shape[1] :].tolist()):
            oracle = Oracle(ThinkingConfig(9), tokens, text, rows[row // beams])
            for token in reply(found, tokens.eos):
                assert oracle.step(token) == token
            assert len(oracle.thought) <= 12
            assert oracle.reason in ("budget", "natural")


def test_forced_tokens_add_nothing_to_a_beams_score(demo: Any, tokens: Any, words: Any) -> None:
    _, tokenizer = demo
    processor = ThinkingLogitsProcessor(tokenizer, ThinkingConfig(1, stop_text="bare", on_eos="stop"))
    first = torch.tensor([words.opened])
    model = ScriptedLM([[words.x] * 9], 512)
    free = processor(first, model(0))
    assert torch.equal(free, model(0))
    forced = processor(torch.tensor([[*words.opened, words.x]]), model(1))
    assert forced[0, tokens.end] == 0
    assert torch.isneginf(forced[0]).sum() == 511


def test_sampling_cannot_slip_past_it(demo: Any, tokens: Any, words: Any) -> None:
    """An unlikely end of text, or marker before the least thinking, would be replaced by the state: it is hidden."""
    _, tokenizer = demo
    config = ThinkingConfig(20, min_tokens=5, min_action="wait")
    processor = ThinkingLogitsProcessor(tokenizer, config, eos_token_id=list(tokens.eos))
    scores = processor(torch.tensor([words.opened]), ScriptedLM([[words.x]], 512)(0))
    assert torch.isneginf(scores[0]).nonzero().flatten().tolist() == sorted([*tokens.eos, tokens.end])


def test_what_it_cannot_do_is_refused(demo: Any, words: Any) -> None:
    _, tokenizer = demo
    ids, scores = torch.tensor([words.opened]), torch.randn(1, 512)
    with pytest.raises(ValueError, match="a probe rule needs the hidden state"):
        ThinkingLogitsProcessor(tokenizer, ThinkingConfig(exits=(ProbeRule(),)))(ids, scores)
    with pytest.raises(ValueError, match="answer_sampling cannot be enforced"):
        ThinkingLogitsProcessor(tokenizer, ThinkingConfig(answer_sampling=SamplingParams()))(ids, scores)
    with pytest.raises(ValueError, match="2 values for 1 rows"):
        ThinkingLogitsProcessor(tokenizer, [5, 6])(ids, scores)
    processor = ThinkingLogitsProcessor(tokenizer, 5)
    processor(ids, scores)
    with pytest.raises(ValueError, match=r"it must see every token once, so use a new processor, or reset\(\)"):
        processor(ids, scores)
    with pytest.raises(ValueError, match="rows that were not there before"):
        processor(torch.tensor([[*words.opened[::-1], 5]]), scores)
    processor.reset()
    processor(ids, scores)


def test_exit_rules_work(demo: Any, words: Any, tokens: Any) -> None:
    _, tokenizer = demo
    processor = ThinkingLogitsProcessor(tokenizer, ThinkingConfig(exits=(MarginRule(100.0, boundary="any"),)))
    processor(torch.tensor([words.opened]), torch.randn(1, 512))
    ids = torch.tensor([[*words.opened, words.x]])
    assert int(processor(ids, torch.randn(1, 512)).argmax()) == tokens.texts["short"][0]
