"""budget_step and budget_guard on every instruction set: the bits of the reference, in a call and in a plan."""

from __future__ import annotations

import pytest
import torch

from qwenopt.ops.budget_guard import BUDGET_GUARD
from qwenopt.ops.budget_state import HASH_MASK, NO_ID, RING, Column, Phase
from qwenopt.ops.budget_step import BUDGET_STEP

ROWS, VOCAB, LENGTH = 64, 50, 12


def arguments(seed: int) -> list[torch.Tensor]:
    """Rows in every phase with small random numbers in all columns, so that all conditions come both ways."""
    torch.manual_seed(seed)
    state = torch.randint(-1, 7, (ROWS, 128), dtype=torch.int32)
    state[:, Column.PHASE] = torch.randint(0, 7, (ROWS,))
    state[:, Column.PENDING] = torch.randint(0, 7, (ROWS,))
    state[:, Column.CTRL] = torch.rand(ROWS) < 0.1
    for column in (Column.MARGIN_TAU, Column.ENTROPY_DELTA, Column.ENTROPY_ETA, Column.ENTROPY_ALPHA,
                   Column.ENTROPY_MEAN, Column.ENTROPY_VAR, Column.PROBE_TAU, Column.SOFT_BIAS):  # fmt: skip
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


@pytest.mark.parametrize("seed", range(10))
def test_step_is_the_references(kernels, isa, seed):
    args, same = arguments(seed), arguments(seed)
    out = torch.full((ROWS,), -7)
    kernels.C.budget_step(*(a.data_ptr() for a in args), out.data_ptr(), ROWS, LENGTH, VOCAB - 3, 2, isa)
    assert torch.equal(out, BUDGET_STEP.reference(*same))
    for a, b in zip(args, same, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(10))
def test_guard_is_the_references(kernels, check, isa, dtype, seed):
    _, _, state, _, _, ids = arguments(seed)
    state[:, Column.SINCE] = torch.randint(-1, 4, (ROWS,))
    logits = check.randn(ROWS, VOCAB + 7, dtype=dtype)
    same = logits.clone()
    kernels.C.budget_guard(
        logits.data_ptr(), state.data_ptr(), ids.data_ptr(), ROWS, VOCAB, VOCAB + 7, dtype == torch.bfloat16, 2, isa
    )
    BUDGET_GUARD.reference(same[:, :VOCAB], state, ids)
    check.same_bits(logits, same)


def test_both_are_steps_of_a_plan(kernels, isa):
    """Guard, then step, on the same state, by the values of one run."""
    args, same = arguments(3), arguments(3)
    logits = torch.randn(ROWS, VOCAB)
    again, out = logits.clone(), torch.full((ROWS,), -7)
    tensors = [logits, *args, out]
    address = {id(t): (i, 1, 0) for i, t in enumerate(tensors)}
    numbers = [(-1, 0, n) for n in (ROWS, VOCAB, VOCAB, 0)]
    guard = [*(address[id(t)] for t in (logits, args[2], args[5])), *numbers]
    step = [*(address[id(t)] for t in (*args, out)), *((-1, 0, n) for n in (ROWS, LENGTH, VOCAB - 3))]
    plan = kernels.C.Plan([("budget_guard", guard, False), ("budget_step", step, True)], len(tensors))
    plan.run([t.data_ptr() for t in tensors], 2, isa)
    BUDGET_GUARD.reference(again, same[2], same[5])
    assert torch.equal(out, BUDGET_STEP.reference(*same))
    assert torch.equal(logits, again)
    assert torch.equal(args[2], same[2])


def test_arguments_are_checked(kernels):
    args = arguments(0)
    with pytest.raises(ValueError, match="budget_step: state is a null pointer"):
        kernels.C.budget_step(1, 1, 0, 1, 1, 1, 1, ROWS, LENGTH, VOCAB, 1)
    with pytest.raises(ValueError, match="budget_step: L is 0; it must be at least 1"):
        kernels.C.budget_step(*[args[0].data_ptr()] * 7, ROWS, 0, VOCAB, 1)
    with pytest.raises(ValueError, match="budget_guard: dtype code 2"):
        kernels.C.budget_guard(*[args[0].data_ptr()] * 3, ROWS, VOCAB, VOCAB, 2, 1)
    assert Phase.DONE == 6
