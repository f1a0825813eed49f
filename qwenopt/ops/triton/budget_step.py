"""budget_step by the Triton kernel."""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwenopt.ops import budget_state
from qwenopt.ops.cpu import contiguous
from qwenopt.ops.triton import one_device

if TYPE_CHECKING:
    from qwenopt.triton_kernels.budget_layout import Layout


@functools.cache
def layout() -> Layout:
    """What the kernels call the numbers of `budget_state`."""
    from qwenopt.triton_kernels.budget_layout import Layout, Names

    def numbers(names: type[enum.IntEnum] | type[enum.IntFlag]) -> Names:
        return Names({name: int(member) for name, member in names.__members__.items()})

    return Layout(
        column=numbers(budget_state.Column),
        phase=numbers(budget_state.Phase),
        reason=numbers(budget_state.Reason),
        bit=numbers(budget_state.Bit),
        id=numbers(budget_state.Id),
        signal=numbers(budget_state.Signal),
        num_signals=len(budget_state.Signal),
        width=budget_state.WIDTH,
        ring=budget_state.RING,
        no_id=budget_state.NO_ID,
        max_grace=budget_state.MAX_GRACE,
        max_implicit=budget_state.MAX_IMPLICIT,
        max_eos=budget_state.MAX_EOS,
        missing_shift=budget_state.MISSING_SHIFT,
        hash_factor=budget_state.HASH_FACTOR,
        hash_mask=budget_state.HASH_MASK,
    )


def accepts(sampled: Tensor, signals: Tensor, state: Tensor, forced: Tensor, lut: Tensor, ids: Tensor) -> str | None:
    tensors = {"sampled": sampled, "signals": signals, "state": state, "forced": forced, "lut": lut, "ids": ids}
    return one_device(**tensors) or contiguous(**tensors)


def budget_step(sampled: Tensor, signals: Tensor, state: Tensor, forced: Tensor, lut: Tensor, ids: Tensor) -> Tensor:
    return laid_out_step(layout(), 1, sampled, signals, state, forced, lut, ids)


def laid_out_step(
    layout: Layout,
    rows_per_program: int,
    sampled: Tensor,
    signals: Tensor,
    state: Tensor,
    forced: Tensor,
    lut: Tensor,
    ids: Tensor,
) -> Tensor:
    """`budget_step` of a state that is laid out like that, with so many rows in a program."""
    from qwenopt.triton_kernels.budget_step import launch

    out = torch.empty_like(sampled)
    if out.numel():
        with torch.cuda.device_of(state):
            launch(layout, rows_per_program, sampled, signals, state, forced, lut, ids, out)
    return out
