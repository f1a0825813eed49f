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
from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.runtime.thinking_exits import EntropyRule, LoopRule, MarginRule, ProbeRule
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.runtime.thinking_tokens import ThinkingTokens, encode
from qwenopt.testing.thinking_oracle import Oracle, Text

ROWS, STEPS, ROUNDS = 25, 90, 40  # 1,000 streams


def random_config(rng: random.Random) -> ThinkingConfig:
    budget = rng.choice([None, 0, 1, 2, 5, 9, 20, 40])
    boundary = rng.choice(["none", "utf8", "sentence", "newline", "paragraph"])
    window = rng.randrange(budget) if budget and boundary not in ("none", "utf8") else 0
    room = (budget or 12) - window if budget != 0 else 0
    exits = [
        MarginRule(rng.choice([0.1, 0.5]), rng.choice([1, 2]), rng.choice(["any", "sentence"])),
        LoopRule(rng.choice([2, 3]), rng.choice(["any", "newline"])),
        EntropyRule(0.6, 0.08, 0.9, rng.choice(["any", "sentence"])),
        ProbeRule(0.6, rng.choice([1, 3]), rng.choice(["any", "sentence"])),
    ]
    return ThinkingConfig(
        budget=budget,
        scope=rng.choice(["request", "block"]),
        stop_text=rng.choice(["qwen3", "report", "short", "bare", "\n\nEnough.</think> So: "]),
        exit_stop_text=rng.choice(["short", "bare"]),
        boundary=boundary,
        window=window,
        soft_bias=rng.choice([0.0, 3.0]) if budget else 0.0,
        min_tokens=rng.choice([0, 0, min(6, room)]),
        min_action=rng.choice(["mask", "wait"]),
        reserve_answer=rng.choice([0, 0, 10, 40]),
        on_eos=rng.choice(["auto", "close", "stop"]),
        implicit_end_ids=rng.choice([None, (), (70, 71)]),
        reclose_guard=rng.choice([0, 3, 8]),
        min_answer_tokens=rng.choice([0, 1, 4]),
        exits=tuple(rule for rule in exits if rng.random() < 0.3),
        count_prompt=rng.random() < 0.7,
    )


class Streams:
    """Tokens that make things happen: markers, ends, half characters, boundaries, and now and then a loop."""

    def __init__(self, tokens: ThinkingTokens, tokenizer: Any) -> None:
        self.markers = [tokens.start, tokens.end, *tokens.eos, tokens.tool, 70]
        half = [piece for c in "你好🙂é" for piece in encode(tokenizer, c)]
        self.plain = [*half, *half, *encode(tokenizer, "\n"), *encode(tokenizer, "."), *encode(tokenizer, "a b c!?")]
        self.tokens = tokens

    def prompt(self, rng: random.Random) -> list[int]:
        t = self.tokens
        turn = [t.turn, 5, 6, *t.eos[:1], t.turn, 7]
        newline = sorted(t.newlines)[0]
        old = [t.start, 5, t.end] if rng.random() < 0.3 else []
        now = rng.choice([[], [], [t.start, newline], [t.start], [t.start, newline, 40, 41], [t.start, 9, t.end, 9]])
        return [*old, *turn, *now]

    def stream(self, rng: random.Random) -> Iterator[int]:
        yield rng.choice([self.tokens.start, self.tokens.start, self.plain[0]])
        loop = [rng.choice(self.plain) for _ in range(rng.choice([1, 2, 5]))]
        while True:
            if rng.random() < 0.15:
                yield from loop * (30 // len(loop))
            yield rng.choice(self.markers) if rng.random() < 0.06 else rng.choice(self.plain)


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
