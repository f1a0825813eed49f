"""budget_guard: the few logits that thinking control changes before sampling, written in place, one element each.

Rows for which nothing is to be changed keep every bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.budget_state import MAX_EOS, NUM_IDS, WIDTH, Bit, Column, Id, Phase
from qwenopt.ops.cuda import budget_step as cuda_kernels
from qwenopt.ops.cuda.providers import register
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, NotPlanned, Steps, need_contiguous
from qwenopt.ops.triton import budget_guard as by_triton


def _check(logits: Tensor, state: Tensor, ids: Tensor) -> None:
    torch._check(
        logits.dim() == 2 and state.shape == (logits.shape[0], WIDTH) and ids.shape == (NUM_IDS,),
        lambda: (
            f"budget_guard: logits {tuple(logits.shape)}, state {tuple(state.shape)} and ids {tuple(ids.shape)} "
            f"must be (R, V), (R, {WIDTH}) and ({NUM_IDS},)"
        ),
    )
    torch._check(
        logits.is_floating_point() and state.dtype == ids.dtype == torch.int32,
        lambda: (
            f"budget_guard: {logits.dtype}, {state.dtype}, {ids.dtype} where floating point, int32, int32 are needed"
        ),
    )


def budget_guard(logits: Tensor, state: Tensor, ids: Tensor) -> None:
    """Write to `logits` [R, V], of any floating dtype, what the state of each row asks for before sampling.

    state int32 [R, 128] (`Column`), ids int32 [8] (`Id`). The end marker gets -inf before a minimum of thinking and
    an added bias towards the end of a budget; after a forced end, both markers and the ends of text get -inf for a
    while. Ids outside the vocabulary are left alone.
    """
    _check(logits, state, ids)
    phase, used, since = state[:, Column.PHASE], state[:, Column.USED], state[:, Column.SINCE]
    think = phase == Phase.THINK
    early = think & (used < state[:, Column.MIN]) & (state[:, Column.WAIT] == 0)
    bias = state[:, Column.SOFT_BIAS].contiguous().view(torch.float32)
    mask = state[:, Column.BOUNDARY]
    here = torch.where(mask == Bit.ANY, state[:, Column.NEED] == 0, (state[:, Column.LAST] & mask) != 0)
    ramp = (used - state[:, Column.SOFT_AT]).float() / state[:, Column.SOFT_WIDTH].clamp(min=1).float()
    ramp = bias * (ramp.clamp(0, 1) * ramp.clamp(0, 1))
    ramp = torch.where(think & here & (bias > 0), ramp, 0.0)
    after = (phase == Phase.ANSWER) & (since >= 0)
    closed, short = after & (since < state[:, Column.GUARD]), after & (since < state[:, Column.MIN_ANSWER])

    ids = torch.cat([ids[: Id.END + 1], ids[Id.EOS : Id.EOS + MAX_EOS]])
    known = (ids >= 0) & (ids < logits.shape[1])
    place = ids.clamp(0, logits.shape[1] - 1).to(torch.int64).expand(logits.shape[0], -1)
    hide = torch.stack([closed, closed | early, *[short] * MAX_EOS], 1) & known
    value = logits.gather(1, place)
    raised = (value[:, Id.END].float() + ramp).to(logits.dtype)
    raised = torch.where((ramp > 0) & known[Id.END], raised, value[:, Id.END])
    value = torch.cat([value[:, :1], raised[:, None], value[:, 2:]], 1).masked_fill(hide, -torch.inf)
    # One id at a time: an id that is not there stands for place 0, and must not undo what another wrote there.
    for i in range(place.shape[1]):
        old = logits.gather(1, place[:, i : i + 1])
        logits.scatter_(1, place[:, i : i + 1], torch.where(known[i], value[:, i : i + 1], old))


BUDGET_GUARD = Op(budget_guard, check=_check, mutates=("logits",))


def _accepts(logits: Tensor, state: Tensor, ids: Tensor) -> str | None:
    return cpu.one_dtype(logits) or cpu.last_dim_contiguous(logits=logits) or cpu.contiguous(state=state, ids=ids)


def _operands(logits: Any, state: Any, ids: Any, stride: int) -> tuple[Any, ...]:
    addresses = (logits.data_ptr(), state.data_ptr(), ids.data_ptr())
    return (*addresses, *logits.shape, stride, cpu.code(logits))


def _record(steps: Steps, logits: Array, state: Array, ids: Array) -> None:
    need_contiguous(logits=logits, state=state, ids=ids)
    if logits.dtype not in cpu.DTYPE_CODES:
        raise NotPlanned(f"logits are {logits.dtype}")
    operands = _operands(logits, state, ids, logits.static_shape()[1])
    steps.add("budget_guard", operands, (logits, state, ids), (logits,), serial=True)


@BUDGET_GUARD.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def budget_guard_cpu(logits: Tensor, state: Tensor, ids: Tensor) -> None:
    cpu.lib().budget_guard(*_operands(logits, state, ids, logits.stride(0)), cpu.threads())


BUDGET_GUARD.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.budget_guard)


# Behind Triton, which is ahead or not by a measurement on a GPU; none was made yet.
register(BUDGET_GUARD, cuda_kernels.accepts_guard, cuda_kernels.guard)
