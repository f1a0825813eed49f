"""1,000 random streams x random configurations: reference, kernel and oracle agree row by row, under row swaps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt import native
from qwenopt.ops.budget_guard import BUDGET_GUARD
from qwenopt.ops.budget_state import NO_ID, Column, Phase
from qwenopt.ops.budget_step import BUDGET_STEP
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.runtime.thinking_tokens import ThinkingTokens
from qwenopt.testing.thinking_oracle import Oracle, Text
from qwenopt.testing.thinking_streams import Streams, random_config

ROWS, STEPS, ROUNDS = 25, 90, 40  # 1,000 streams


class Twin:
    """The same rows twice: by the reference and by the kernel (or the reference again, where there is none)."""

    def __init__(self, tokens: ThinkingTokens) -> None:
        def make() -> ThinkingState:
            return ThinkingState(ROWS, tokens, signals=("margin", "entropy"), probe=lambda h: h[:, 0], max_forced=96)

        self.both = (make(), make())
        have = native.available()
        self.steps = (BUDGET_STEP.reference, BUDGET_STEP.providers[0].fn if have else BUDGET_STEP.reference)
        self.guards = (BUDGET_GUARD.reference, BUDGET_GUARD.providers[0].fn if have else BUDGET_GUARD.reference)

    def step(self, sampled: Tensor, signals: Tensor) -> Tensor:
        outs = []
        for one, step in zip(self.both, self.steps, strict=True):
            one.signals.copy_(signals)
            outs.append(step(sampled, one.signals, one.state, one.forced, one.lut, one.ids))
        assert torch.equal(*outs)
        assert torch.equal(self.both[0].state, self.both[1].state)
        return outs[0]

    def guard(self, logits: Tensor) -> Tensor:
        outs = []
        for one, guard in zip(self.both, self.guards, strict=True):
            outs.append(logits.clone())
            guard(outs[-1], one.state, one.ids)
        assert torch.equal(outs[0].view(torch.int16), outs[1].view(torch.int16))
        return outs[0]


def run_round(seed: int, tokens: ThinkingTokens, tokenizer: Any, text: Text, seen: set[str]) -> None:
    rng, twin, streams = random.Random(seed), Twin(tokens), Streams(tokens, tokenizer)
    rows: list[tuple[Oracle, Iterator[int]]] = []
    for row in range(ROWS):
        config, prompt, max_new = random_config(rng), streams.prompt(rng), rng.choice([STEPS, 50])
        for one in twin.both:
            one.admit(row, config, prompt, max_new)
        rows.append((Oracle(config, tokens, text, prompt, max_new), streams.stream(rng)))
    values = torch.tensor([0.05, 0.2, 0.45, 0.55, 0.7, 0.1], dtype=torch.float32)
    for step in range(STEPS):
        if rng.random() < 0.1:
            order = rng.sample(range(ROWS), ROWS)
            rows = [rows[i] for i in order]
            for one in twin.both:
                one.permute_rows(order)
        if rng.random() < 0.05:
            row = rng.randrange(ROWS)
            rows[row][0].manual = rows[row][0].phase != "done"
            for one in twin.both:
                one.end_now(row)
        if step % 5 == 0:
            check_guard(twin, rows, tokens, (torch.bfloat16, torch.float32)[step % 2])
        sampled = [next(stream) for _, stream in rows]
        signals = values[
            torch.randint(len(values), (ROWS, 3), generator=torch.Generator().manual_seed(rng.getrandbits(30)))
        ]
        out = [rng.random() < 0.1 for _ in rows]  # rows that sit this step out
        given = [NO_ID if away else t for away, t in zip(out, sampled, strict=True)]
        found = twin.step(torch.tensor(given), signals).tolist()
        wanted = [
            NO_ID if away else oracle.step(t, *s)
            for (oracle, _), t, s, away in zip(rows, sampled, signals.tolist(), out, strict=True)
        ]
        assert found == wanted, f"round {seed}, step {step}"
        seen.update(oracle.reason for oracle, _ in rows)
    for row, (oracle, _) in enumerate(rows):
        assert twin.both[0].stats(row) == oracle.stats()
        assert oracle.stats().generated_tokens == len(oracle.out)


def check_guard(
    twin: Twin, rows: list[tuple[Oracle, Iterator[int]]], tokens: ThinkingTokens, dtype: torch.dtype
) -> None:
    logits = torch.randn(ROWS, 512).to(dtype)
    found = twin.guard(logits)
    wanted = logits.clone()
    for row, (oracle, _) in enumerate(rows):
        hidden, bias = oracle.guard()
        if bias:
            wanted[row, tokens.end] = (wanted[row, tokens.end].float() + bias).to(wanted.dtype)
        wanted[row, sorted(hidden)] = -torch.inf
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("part", range(4))
def test_thousand_streams_equal_the_oracle(part: int, tokens: ThinkingTokens, tokenizer: Any, text: Text) -> None:
    seen: set[str] = set()
    for seed in range(part, ROUNDS, 4):
        run_round(seed, tokens, tokenizer, text, seen)
    # Streams in which nothing happens would prove nothing.
    assert seen >= {"natural", "tool", "eos", "disabled", "manual", "budget", "reserve", "window"}
    assert seen >= {"margin", "loop", "entropy", "probe"}


def test_columns_are_numbered_without_gaps() -> None:
    assert [int(c) for c in Column] == [c for c in range(64) if not Column.IMPLICIT < c < Column.GUARD]
    assert [int(p) for p in Phase] == list(range(7))
