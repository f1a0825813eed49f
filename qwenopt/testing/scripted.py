"""A model that says what a script tells it, and a decode loop of a few lines: thinking control without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwenopt.runtime.sample import Sampler
from qwenopt.runtime.thinking import ThinkingConfig, ThinkingStats
from qwenopt.runtime.thinking_state import ThinkingState

STRONG = 8.0  # how far the scripted token is above the next


class ScriptedLM:
    """Logits [R, V] whose largest, in row r at step t, is that of `scripts[r][t]`; the last token of a script repeats.

    The other logits are random, the same in each run.
    """

    def __init__(self, scripts: Sequence[Sequence[int]], vocab: int, seed: int = 0) -> None:
        self.scripts, self.vocab, self.seed = [list(s) for s in scripts], vocab, seed

    def __call__(self, step: int) -> Tensor:
        rows = []
        for row, script in enumerate(self.scripts):
            noise = torch.Generator().manual_seed(self.seed + 1000 * row + step)
            logits = torch.rand(self.vocab, generator=noise)
            logits[script[min(step, len(script) - 1)]] += STRONG
            rows.append(logits)
        return torch.stack(rows)


@dataclass
class Played:
    """What came of a run: the ids of each row, its statistics, and the state as it was left."""

    ids: list[list[int]]
    stats: list[ThinkingStats]
    state: ThinkingState


def play(
    state: ThinkingState,
    configs: Sequence[ThinkingConfig | None],
    prompts: Sequence[Sequence[int]],
    model: Callable[[int], Tensor],
    steps: int,
    *,
    sampler: Sampler | None = None,
    wrap: Callable[[Any], Any] = lambda tail: tail,
    max_new: int | None = None,
    before: Callable[[int], None] = lambda step: None,
    hidden: Callable[[int], Tensor] | None = None,
) -> Played:
    """Admit a row per config and run `steps` decode steps; `wrap` compiles the tail, `before(step)` acts between."""
    sampler = sampler or Sampler(state.rows, greedy=True)
    for row, (config, prompt) in enumerate(zip(configs, prompts, strict=True)):
        state.admit(row, config, prompt, max_new)
    tail = wrap(state)
    out = []
    for step in range(steps):
        before(step)
        out.append(tail(model(step), sampler, None, None if hidden is None else hidden(step)).clone())
    ids = torch.stack(out, 1).tolist() if out else [[] for _ in configs]
    return Played(ids, [state.stats(row) for row in range(len(configs))], state)
