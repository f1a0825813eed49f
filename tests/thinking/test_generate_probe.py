"""ProbeRule in qwenopt.generate, and the labels that a probe is fitted to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qwenopt
from qwenopt.demo.load import demo_model
from qwenopt.demo.task import is_correct, unseen_questions
from qwenopt.errors import QwenoptError
from qwenopt.runtime.paged_cache import PagedKVCache
from qwenopt.runtime.thinking_exits import LoopRule, ProbeRule
from qwenopt.runtime.thinking_labels import boundaries, label_boundaries

TAU = 0.5
RULE = ProbeRule(TAU, boundary="sentence")
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> Any:
    return demo_model(request.param, torch.float32)[0]


@pytest.fixture(scope="module")
def dense() -> Any:
    return demo_model("dense", torch.float32)[0]


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    chats = [[{"role": "user", "content": question.text}] for question in unseen_questions(count)]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    return [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def probe_of(model: Any, seed: int) -> nn.Module:
    """A random direction, whose score is seldom above TAU."""
    probe = nn.Linear(model.config.hidden_size, 1).requires_grad_(False)
    probe.weight.copy_(torch.randn(probe.weight.shape, generator=torch.Generator().manual_seed(seed)) / 8)
    probe.bias.fill_(-1.0)
    return probe


@torch.no_grad()
def scores(model: Any, probe: nn.Module, ids: list[int]) -> Tensor:
    """By transformers alone, one at a time."""
    return probe(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1])[0, :, 0]


@pytest.mark.slow
def test_thinking_ends_where_the_probe_says_so(model: Any, tokens: Any, tokenizer: Any) -> None:
    """At the first boundary whose hidden state, as transformers computes it, scores above tau; more prompts than lines,
    so that a probe is read in steps that read prompts as well. A second probe needs no second graph.
    """
    given = prompts(tokenizer, 6)
    cache = PagedKVCache(model.config, max_batch_size=2, num_pages=64, page_size=16, dtype=model.dtype)
    config, seen = qwenopt.ThinkingConfig(exits=(RULE,)), []
    for seed in (1, 2):
        probe = probe_of(model, seed)
        out = qwenopt.generate(
            model, given, max_new_tokens=100, thinking=config, tokenizer=tokenizer, probe=probe, cache=cache, **GREEDY
        )
        for prompt, reply, stats in zip(given, out.replies, out.thinking, strict=True):
            high = scores(model, probe, prompt + reply)[len(prompt) - 1 :] > TAU
            ends = [end for end in boundaries(reply, tokens, "sentence") if high[end]]
            assert stats.exit_step == (ends[0] if ends and stats.reason == "probe" else None)
            assert (stats.reason == "probe") == (bool(ends) and ends[0] < len(reply))
            seen.append(stats.reason)
        if seed == 1:
            before = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == before
    assert {"probe"} < set(seen)
    graph = qwenopt.last_report().graphs[-1]
    assert graph.counts["budget_step"] == 1
    assert graph.counts["paged_attention"] == model.config.num_hidden_layers


@pytest.mark.slow
def test_a_probe_that_no_rule_reads_changes_nothing(dense: Any, tokenizer: Any) -> None:
    given = prompts(tokenizer, 2)
    ask = {"max_new_tokens": 40, "tokenizer": tokenizer, "thinking": qwenopt.ThinkingConfig(20), **GREEDY}
    plain = qwenopt.generate(dense, given, **ask)
    before = counters["stats"]["unique_graphs"]
    probed = qwenopt.generate(dense, given, probe=probe_of(dense, 1), **ask)
    assert probed.replies == plain.replies
    assert counters["stats"]["unique_graphs"] == before
    mixed = [qwenopt.ThinkingConfig(20), qwenopt.ThinkingConfig(exits=(ProbeRule(1e9, boundary="any"),))]
    beside = qwenopt.generate(dense, given, probe=probe_of(dense, 1), **{**ask, "thinking": mixed})
    assert beside.replies[0] == plain.replies[0]


@pytest.mark.slow
def test_a_probe_by_way_of_transformers(dense: Any, tokenizer: Any) -> None:
    given, probe = prompts(tokenizer, 1), probe_of(dense, 1)
    probe.bias.fill_(10.0)  # at the first boundary
    config = qwenopt.ThinkingConfig(exits=(RULE,))
    ask = {"max_new_tokens": 40, "probe": probe, "thinking": config}
    wanted = qwenopt.generate(dense, given, tokenizer=tokenizer, **ask, **GREEDY)
    found = dense.generate(
        torch.tensor(given), do_sample=False, return_dict_in_generate=True, custom_generate=qwenopt.hf_generate,
        thinking_tokenizer=tokenizer, **ask,
    )  # fmt: skip
    assert found.replies == wanted.replies
    assert found.thinking[0].reason == "probe"


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        (None, r"ProbeRule without probe=...; need the probe whose score it reads"),
        (lambda hidden: hidden, r"need a function from hidden states \(1, 128\) torch.float32 on cpu to 1 scores"),
        (lambda hidden: 0.5, "to 1 scores in floating point; it gave float"),
        (nn.Linear(64, 1), "Linear; need .* it raised RuntimeError: "),
    ],
)
def test_a_probe_that_does_not_fit_is_refused(dense: Any, tokenizer: Any, probe: Any, text: str) -> None:
    config = qwenopt.ThinkingConfig(exits=(RULE, LoopRule()))
    with pytest.raises(QwenoptError, match=text):
        qwenopt.generate(dense, [[1, 2]], max_new_tokens=4, thinking=config, tokenizer=tokenizer, probe=probe)


@pytest.mark.slow
def test_labels_are_what_an_answer_at_the_boundary_is(dense: Any, tokens: Any, tokenizer: Any) -> None:
    questions, given = unseen_questions(3), prompts(tokenizer, 3)

    def is_right(i: int, ids: list[int]) -> bool:
        return is_correct(questions[i], tokenizer.decode(ids))

    found = label_boundaries(
        dense, given, is_right, tokens, max_new_tokens=400, answer_tokens=16, per_question=9, **GREEDY
    )
    assert found.hidden.shape == (len(found.right), dense.config.hidden_size)
    assert found.question.unique().tolist() == [0, 1, 2]
    assert int(found.question.bincount().max()) <= 9
    whole = qwenopt.generate(
        dense, given, max_new_tokens=400, thinking=qwenopt.ThinkingConfig(), tokenizer=tokens, **GREEDY
    )
    for i, (prompt, reply) in enumerate(zip(given, whole.replies, strict=True)):
        mine = found.question == i
        places = (found.thought[mine] + reply.index(tokens.start) + 1).tolist()
        assert set(places) <= set(boundaries(reply, tokens, "sentence"))
        with torch.no_grad():
            states = dense(torch.tensor([prompt + reply]), output_hidden_states=True).hidden_states[-1][0]
        wanted = states[[len(prompt) + place - 1 for place in places]]
        torch.testing.assert_close(found.hidden[mine], wanted, rtol=1e-4, atol=1e-4)
        right = found.right[mine].tolist()
        assert not right[0]  # nothing is known at the first boundary
        assert right[-1]  # all has been checked at the last


def test_boundaries_are_those_of_the_first_block(tokens: Any, tokenizer: Any) -> None:
    reply = tokenizer.encode("<think>\nOne. Two.\n\nx</think>\n\nThree. Four.", add_special_tokens=False)
    places = boundaries(reply, tokens, "sentence")
    assert [tokenizer.decode(reply[1:end]) for end in places][-1].endswith("Two.\n\n")
    assert max(places) < reply.index(tokens.end)
    assert len(boundaries(reply, tokens, "any")) == reply.index(tokens.end) - 1
    opened = tokenizer.encode("One.\nTwo", add_special_tokens=False)  # the prompt had the marker
    assert len(boundaries(opened, tokens, "newline")) == 1
