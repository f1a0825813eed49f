"""budget_guard and budget_step beside what a decode step does anyway with its logits, at Qwen3's vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt.ops.budget_guard import BUDGET_GUARD
from qwenopt.ops.budget_state import NO_ID, NUM_IDS, Bit, Column, Id, Phase
from qwenopt.ops.budget_step import BUDGET_STEP
from qwenopt.ops.op import Op

VOCAB = 151936


def thinking_rows(rows: int) -> tuple[torch.Tensor, ...]:
    """What `ThinkingState` holds for rows that think without end, so that each round does the same."""
    state = torch.zeros(rows, 128, dtype=torch.int32)
    state[:, Column.PHASE], state[:, Column.SINCE] = Phase.THINK, -1
    state[:, Column.BUDGET] = state[:, Column.WINDOW_AT] = state[:, Column.RESERVE_AT] = -1
    ids = torch.full((NUM_IDS,), NO_ID, dtype=torch.int32)
    ids[Id.START], ids[Id.END], ids[Id.EOS] = 151667, 151668, 151645
    lut = torch.full((VOCAB,), int(Bit.ANY), dtype=torch.uint8)
    return torch.full((rows,), 100), torch.zeros(rows, 3), state, torch.zeros(rows, 64, dtype=torch.int32), lut, ids


def call(op: Op, impl: str) -> Any:
    return op.reference if impl == "reference" else op


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("impl", ["argmax", "reference", "cpu"])
@pytest.mark.ci
def bench_budget_step(benchmark: Any, rows: int, impl: str) -> None:
    """Guard and step together; argmax is the least that sampling costs."""
    logits, args = torch.randn(rows, VOCAB), thinking_rows(rows)
    guard, step = call(BUDGET_GUARD, impl), call(BUDGET_STEP, impl)

    def both() -> None:
        guard(logits, args[2], args[5])
        step(*args)

    benchmark.group = f"budget_step-{rows} rows"
    benchmark.pedantic(both if impl != "argmax" else lambda: logits.argmax(-1), rounds=100, warmup_rounds=10)
