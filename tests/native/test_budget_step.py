"""budget_step and budget_guard on every instruction set: the bits of the reference, in a call and in a plan."""

from __future__ import annotations

import pytest
import torch

from qwenopt.ops.budget_guard import BUDGET_GUARD
from qwenopt.ops.budget_state import Column, Phase
from qwenopt.ops.budget_step import BUDGET_STEP
from qwenopt.testing.budget_rows import LENGTH, ROWS, VOCAB, random_rows


@pytest.mark.parametrize("seed", range(10))
def test_step_is_the_references(kernels, isa, seed):
    args, same = random_rows(seed), random_rows(seed)
    out = torch.full((ROWS,), -7)
    kernels.C.budget_step(*(a.data_ptr() for a in args), out.data_ptr(), ROWS, LENGTH, VOCAB - 3, 2, isa)
    assert torch.equal(out, BUDGET_STEP.reference(*same))
    for a, b in zip(args, same, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(10))
def test_guard_is_the_references(kernels, check, isa, dtype, seed):
    _, _, state, _, _, ids = random_rows(seed)
    state[:, Column.SINCE] = torch.randint(-1, 4, (ROWS,))
    logits = check.randn(ROWS, VOCAB + 7, dtype=dtype)
    same = logits.clone()
    kernels.C.budget_guard(
        logits.data_ptr(), state.data_ptr(), ids.data_ptr(), ROWS, VOCAB, VOCAB + 7, kernels.code(dtype), 2, isa
    )
    BUDGET_GUARD.reference(same[:, :VOCAB], state, ids)
    check.same_bits(logits, same)


def test_both_are_steps_of_a_plan(kernels, isa):
    """Guard, then step, on the same state, by the values of one run."""
    args, same = random_rows(3), random_rows(3)
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
    args = random_rows(0)
    with pytest.raises(ValueError, match="budget_step: state is a null pointer"):
        kernels.C.budget_step(1, 1, 0, 1, 1, 1, 1, ROWS, LENGTH, VOCAB, 1)
    with pytest.raises(ValueError, match="budget_step: L is 0; it must be at least 1"):
        kernels.C.budget_step(*[args[0].data_ptr()] * 7, ROWS, 0, VOCAB, 1)
    with pytest.raises(ValueError, match="budget_guard: dtype code 3"):
        kernels.C.budget_guard(*[args[0].data_ptr()] * 3, ROWS, VOCAB, VOCAB, 3, 1)
    assert Phase.DONE == 6
