"""budget_step and budget_guard, emulated: the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenopt.ops.budget_guard import BUDGET_GUARD
from qwenopt.ops.budget_state import HASH_MASK, NO_ID, RING, Column
from qwenopt.ops.budget_step import BUDGET_STEP
from qwenopt.ops.cuda import budget_step as kernels
from qwenopt.testing.emulated import Emulation

ROWS, VOCAB, LENGTH = 70, 50, 12
FLOATS = (Column.MARGIN_TAU, Column.ENTROPY_DELTA, Column.ENTROPY_ETA, Column.ENTROPY_ALPHA, Column.ENTROPY_MEAN,
          Column.ENTROPY_VAR, Column.PROBE_TAU, Column.SOFT_BIAS)  # fmt: skip


def arguments(seed: int) -> list[Tensor]:
    """Rows in every phase with small random numbers in all columns, so that all conditions come both ways."""
    torch.manual_seed(seed)
    state = torch.randint(-1, 7, (ROWS, 128), dtype=torch.int32)
    state[:, Column.CTRL] = torch.rand(ROWS) < 0.1
    for column in (Column.PHASE, Column.PENDING):
        state[:, column] = torch.randint(0, 7, (ROWS,))
    for column in FLOATS:
        state[:, column] = torch.rand(ROWS).view(torch.int32)
    state[:, Column.IMPLICIT : Column.IMPLICIT + 4] = torch.tensor([3, NO_ID, NO_ID, NO_ID])
    state[:, Column.LAST] = torch.randint(0, 256, (ROWS,))
    for column in (Column.BUDGET_SKIP, Column.EXIT_SKIP):
        state[:, column] = torch.randint(0, 2, (ROWS,))
    state[:, Column.LOOP_HASH] = torch.randint(0, HASH_MASK, (ROWS,))
    state[:, Column.LOOP_NEXT] = torch.randint(0, RING, (ROWS,))
    ids = torch.tensor([0, 1, 2, NO_ID, 4, 5, NO_ID, NO_ID], dtype=torch.int32)
    sampled = torch.where(torch.rand(ROWS) < 0.5, torch.randint(-2, 7, (ROWS,)), torch.randint(0, VOCAB, (ROWS,)))
    forced = torch.randint(0, VOCAB, (ROWS, LENGTH), dtype=torch.int32)
    lut = torch.randint(0, 256, (VOCAB - 3,), dtype=torch.uint8)  # some ids lie outside
    return [sampled, torch.rand(ROWS, 3), state, forced, lut, ids]


@pytest.mark.parametrize("seed", range(6))
def test_step_is_the_references(emulation: Emulation, seed: int) -> None:
    args, same = arguments(seed), arguments(seed)
    assert kernels.accepts_step(*args) is None
    out = emulation.call(kernels.step, *args)
    assert torch.equal(out, BUDGET_STEP.reference(*same))
    for found, wanted in zip(args, same, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guard_is_the_references(emulation: Emulation, dtype: torch.dtype, seed: int) -> None:
    _, _, state, _, _, ids = arguments(seed)
    state[:, Column.SINCE] = torch.randint(-1, 4, (ROWS,))
    logits = torch.randn(ROWS, VOCAB + 7).to(dtype)
    same = logits.clone()
    emulation.call(kernels.guard, logits[:, :VOCAB], state, ids)
    BUDGET_GUARD.reference(same[:, :VOCAB], state, ids)
    assert torch.equal(logits, same)


def test_no_rows(emulation: Emulation) -> None:
    args = [a[:0] if i < 4 else a for i, a in enumerate(arguments(0))]
    assert emulation.call(kernels.step, *args).shape == (0,)
