"""budget_step and budget_guard, emulated: the bits of the reference."""

from __future__ import annotations

import pytest
import torch

from qwenopt.ops.budget_guard import BUDGET_GUARD
from qwenopt.ops.budget_state import Column
from qwenopt.ops.budget_step import BUDGET_STEP
from qwenopt.ops.cuda import budget_step as kernels
from qwenopt.testing.budget_rows import ROWS, VOCAB, random_rows
from qwenopt.testing.emulated import Emulation


@pytest.mark.parametrize("seed", range(6))
def test_step_is_the_references(emulation: Emulation, seed: int) -> None:
    args, same = random_rows(seed), random_rows(seed)
    assert kernels.accepts_step(*args) is None
    out = emulation.call(kernels.step, *args)
    assert torch.equal(out, BUDGET_STEP.reference(*same))
    for found, wanted in zip(args, same, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guard_is_the_references(emulation: Emulation, dtype: torch.dtype, seed: int) -> None:
    _, _, state, _, _, ids = random_rows(seed)
    state[:, Column.SINCE] = torch.randint(-1, 4, (ROWS,))
    logits = torch.randn(ROWS, VOCAB + 7).to(dtype)
    same = logits.clone()
    emulation.call(kernels.guard, logits[:, :VOCAB], state, ids)
    BUDGET_GUARD.reference(same[:, :VOCAB], state, ids)
    assert torch.equal(logits, same)


def test_no_rows(emulation: Emulation) -> None:
    args = [a[:0] if i < 4 else a for i, a in enumerate(random_rows(0))]
    assert emulation.call(kernels.step, *args).shape == (0,)
