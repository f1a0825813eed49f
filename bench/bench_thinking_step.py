"""A decode step of a whole model with thinking control, beside the same step without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_generate import random_model
from bench_paged_cache import Paged

import qwenopt
from qwenopt import native
from qwenopt.cli import measure
from qwenopt.runtime.sample import Sampler
from qwenopt.runtime.tail import Tail
from qwenopt.runtime.thinking_replay import take_forced
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.runtime.thinking_tokens import ThinkingTokens

ROUNDS = 25
PRESENT = 32  # tokens in each row

CASES = [
    *(pytest.param("0.6B-2-layers", rows, id=f"0.6B-2-layers-batch{rows}", marks=pytest.mark.ci) for rows in (1, 8)),
    *(pytest.param("0.6B", rows, id=f"0.6B-batch{rows}") for rows in (1, 8, 64)),
]


def controlled(rows: int, tokens: ThinkingTokens, signals: tuple[str, ...] = ()) -> Tail:
    """A tail whose rows think within a budget that they do not reach."""
    state = ThinkingState(rows, tokens, signals=signals)
    for row in range(rows):
        state.admit(row, qwenopt.ThinkingConfig(budget=1 << 20), [tokens.start])
    return Tail(Sampler(rows, greedy=True), state)


@pytest.mark.skipif(not native.available(), reason=f"a step is one native call: {native.why_not()}")
@pytest.mark.parametrize(("name", "rows"), CASES)
def bench_thinking_step(benchmark: Any, name: str, rows: int) -> None:
    """`overhead`: how much longer a step takes than without control, by what is controlled; same rounds."""
    model = random_model(name)
    _, tokenizer = qwenopt.demo_model("dense")
    tokens = ThinkingTokens.of(tokenizer, vocab_size=model.config.vocab_size)
    tails = {
        "without": Tail(Sampler(rows, greedy=True)),
        "budget": controlled(rows, tokens),
        "margin": controlled(rows, tokens, ("margin",)),
        "entropy": controlled(rows, tokens, ("entropy",)),
    }
    contenders = {kind: Paged(model, rows, PRESENT, tail=tail).run for kind, tail in tails.items()}
    for contender in contenders.values():
        contender()
    rounds = measure.alternate(contenders, ROUNDS)
    benchmark.extra_info["step_ms"] = {k: measure.spread([s * 1e3 for s in v]).to_dict() for k, v in rounds.items()}
    benchmark.extra_info["overhead"] = {
        kind: measure.spread([a / b - 1 for a, b in zip(times, rounds["without"], strict=True)]).to_dict()
        for kind, times in rounds.items()
        if kind != "without"
    }
    benchmark.pedantic(contenders["budget"], rounds=3)


@pytest.mark.ci
def bench_closing_text(benchmark: Any) -> None:
    """Where a row's budget ends: its state moved behind the closing text, whose tokens are then computed in one step.

    With one budget all rows come there in the same step, and it waits for each.
    """
    _, tokenizer = qwenopt.demo_model("dense")
    tokens = ThinkingTokens.of(tokenizer)
    state, ids = ThinkingState(1, tokens), torch.zeros(1, dtype=torch.int64)

    def begin() -> None:
        state.admit(0, qwenopt.ThinkingConfig(budget=1), [tokens.start])
        state.step(ids)
        state.step(ids)

    begin()
    benchmark.extra_info["tokens"] = len(take_forced(state, 0))
    assert benchmark.extra_info["tokens"] == len(tokens.texts["qwen3"]) - 1
    benchmark.pedantic(lambda: take_forced(state, 0), setup=begin, rounds=200, warmup_rounds=5)
