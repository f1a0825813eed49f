"""T2, T4, T21, T28, T29: on a trained model, in compiled steps, and what it costs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from qwenopt.demo.load import demo_model
from qwenopt.demo.task import unseen_questions
from qwenopt.report import last_report
from qwenopt.runtime.sample import Sampler, SamplingParams
from qwenopt.runtime.tail import Tail
from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.runtime.thinking_replay import take_forced
from qwenopt.runtime.thinking_state import ThinkingState

STEPS = 120
PLAIN = {"reclose_guard": 0, "min_answer_tokens": 0}  # Qwen's recipe guards nothing


@pytest.fixture(scope="module")
def model() -> Any:
    return demo_model("dense", dtype=torch.float32)[0]


def prompts(tokenizer: Any, **given: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": question.text}] for question in unseen_questions(3)]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True, **given) for c in chats]
    return [list(tokenizer.encode(t, add_special_tokens=False)) for t in texts]


@torch.no_grad()
def decode(
    model: Any, tokens: Any, prompt: list[int], config: Any, steps: int, append: bool = False
) -> tuple[Any, Any]:
    """A greedy reply; with `append`, the forced tokens of a text go through the model in one forward."""
    state, cache = ThinkingState(1, tokens), DynamicCache(config=model.config)
    tail = Tail(Sampler(1, greedy=True), state)
    state.admit(0, config, prompt, steps)
    out, new = [], list(prompt)
    while len(out) < steps and (not out or out[-1] not in tokens.eos):
        logits = model(torch.tensor([new]), past_key_values=cache, use_cache=True).logits[:, -1]
        new = [int(tail(logits, torch.tensor([True]))[0])]
        new += take_forced(state, 0) if append else []
        out += new
    return out, cache


@torch.no_grad()
def two_pass(model: Any, tokens: Any, prompt: list[int], budget: int, steps: int) -> list[int]:
    """The recipe of Qwen's documentation."""

    def greedy(ids: list[int], count: int) -> list[int]:
        given = torch.tensor([ids])
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=list(tokens.eos),
        )
        return out[0, len(ids) :].tolist()

    first = greedy(prompt, budget)
    if not set(first) & set(tokens.eos) and tokens.end not in first:
        first += tokens.texts["qwen3"]
    left = steps - len(first)
    return first + (greedy(prompt + first, left) if left > 0 and not set(first) & set(tokens.eos) else [])


@pytest.mark.slow
@pytest.mark.parametrize("opened", [False, True], ids=["hybrid", "opened"])
@pytest.mark.parametrize("budget", [1, 12, 40])
def test_t02_the_two_pass_recipe_of_the_documentation(
    model: Any, tokens: Any, tokenizer: Any, opened: bool, budget: int
) -> None:
    """Its budget counts the marker where the model writes it: one more there for the same thinking."""
    tail = [tokens.start, *tokenizer.encode("\n", add_special_tokens=False)] if opened else []
    cut = 0
    for prompt in prompts(tokenizer):
        config = ThinkingConfig(budget, boundary="none", on_eos="stop", **PLAIN)
        mine, _ = decode(model, tokens, prompt + tail, config, STEPS)
        theirs = two_pass(model, tokens, prompt + tail, budget if opened else budget + 1, STEPS)
        assert mine == theirs[: len(mine)]
        assert len(theirs) - len(mine) <= 1
        cut += len(tokens.texts["qwen3"]) <= len(mine)
    assert cut or budget > 12


def test_t04_no_thinking_is_what_the_template_writes(model: Any, tokens: Any, tokenizer: Any) -> None:
    """Ids and cache are those of a prompt made with enable_thinking=False."""
    block = list(tokens.empty_block)
    switched = prompts(tokenizer, enable_thinking=False)
    for prompt, off in zip(prompts(tokenizer), switched, strict=True):
        assert off == prompt + block
        mine, cache = decode(model, tokens, prompt, ThinkingConfig(0), 40)
        theirs, other = decode(model, tokens, off, None, 40 - len(block))
        assert mine == block + theirs
        for a, b in zip(cache.layers, other.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(a.values, b.values, rtol=1e-5, atol=1e-5)


def test_t28_a_forced_text_in_one_forward(model: Any, tokens: Any, tokenizer: Any) -> None:
    for prompt in prompts(tokenizer):
        single, one = decode(model, tokens, prompt, ThinkingConfig(4), 70)
        whole, two = decode(model, tokens, prompt, ThinkingConfig(4), 70, append=True)
        assert len(tokens.texts["qwen3"]) > 20
        assert whole[: len(single)] == single[: len(whole)]
        length = min(one.get_seq_length(), two.get_seq_length())
        for a, b in zip(one.layers, two.layers, strict=True):
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(a.keys[:, :, :length], b.keys[:, :, :length], **close)
            torch.testing.assert_close(a.values[:, :, :length], b.values[:, :, :length], **close)


class Step(torch.nn.Module):
    """One decode step: model, sampler, thinking."""

    def __init__(self, model: Any, tail: Tail) -> None:
        super().__init__()
        self.model, self.tail = model, tail

    def forward(self, ids: Tensor, positions: Tensor, cache: Any, emit: Tensor) -> Tensor:
        logits = self.model(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1]
        return self.tail(logits, emit)


@pytest.mark.parametrize("lowering", ["eager", "direct", "inductor"])
def test_t21_one_graph_for_all_configurations(model: Any, tokens: Any, tokenizer: Any, lowering: str) -> None:
    """A compiled step gives eager's ids while configurations change between steps, and is compiled once."""
    start = [p[:12] for p in prompts(tokenizer)]

    def run(compile: bool) -> list[list[int]]:
        state = ThinkingState(3, tokens, signals=("margin",))
        tail = Tail(Sampler(3, max_top_k=8), state)
        step: Any = Step(model, tail)
        backend = "eager" if lowering == "eager" else "qwenopt"
        options = {} if lowering == "eager" else {"options": {"lowering": lowering}}
        step = torch.compile(step, backend=backend, fullgraph=True, **options) if compile else step
        cache = StaticCache(config=model.config, max_cache_len=128)
        ids, emit, out = torch.tensor(start), torch.ones(3, dtype=torch.bool), []
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache, use_cache=True)
            for i in range(50):
                if i % 7 == 0:
                    state.admit(i // 7 % 3, ThinkingConfig([0, 5, None, 9][i // 7 % 4]), start[0])
                    tail.sampler.set_row(i // 7 % 3, SamplingParams(temperature=0.1 * i, top_k=1 + i % 8, seed=i))
                with torch._dynamo.config.patch(error_on_recompile=True):
                    ids = step(
                        ids[:, -1:].contiguous(), torch.full((1, 1), 11 + i).expand(3, 1).contiguous(), cache, emit
                    )[:, None]
                out.append(ids[:, 0].clone())
        return torch.stack(out, 1).tolist()

    wanted = run(compile=False)
    assert run(compile=True) == wanted
    if lowering != "eager":
        counts = last_report().graphs[-1].counts
        ops = ("logit_signals", "budget_guard", "top_tokens", "budget_step")
        assert {op: counts[op] for op in ops} == dict.fromkeys(ops, 1)


@pytest.mark.gpu
def test_t21_no_host_read_and_no_recompile_on_a_gpu(tokens: Any, words: Any) -> None:
    state, sampler = ThinkingState(4, tokens, device="cuda"), Sampler(4, device="cuda")
    for row in range(4):
        state.admit(row, ThinkingConfig(row + 1), words.opened)
    logits = torch.randn(60, 4, 512, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = [state(x, sampler).clone() for x in logits]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = ThinkingState(4, tokens)
    for row in range(4):
        again.admit(row, ThinkingConfig(row + 1), words.opened)
    wanted = [again(x.cpu(), Sampler(4)).tolist() for x in logits]
    assert [ids.tolist() for ids in out] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_t29_what_a_step_costs(qwen: Any, rows: int) -> None:
    """Guard and step together against the least that a decode step takes: a hundredth of it at most.

    Every step reads the weights, 1.19 GB of the 0.6B model, and takes an argmax over the vocabulary. Both are timed in
    the same rounds, since what else runs on the machine makes them slower too.
    """
    state, logits = ThinkingState(rows, qwen), torch.randn(rows, 151936)
    for row in range(rows):
        state.admit(row, ThinkingConfig(100 + row), [qwen.turn, qwen.start, 198])
    ids, weights = torch.full((rows,), 100), torch.ones(1_190_000_000 // 4)
    shares = []
    for _ in range(25):
        begin = time.perf_counter()
        state.adjust_(logits)
        state.step(ids)
        thought = time.perf_counter()
        logits.argmax(-1)
        weights.sum()
        shares.append((thought - begin) / (time.perf_counter() - thought))
    share = sorted(shares)[12]
    assert share < 0.01, f"{100 * share:.2f} % of a step"
