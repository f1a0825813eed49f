"""budget_step by the Triton kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwenopt.ops.cpu import contiguous
from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton.budget_layout import layout

if TYPE_CHECKING:
    from qwenopt.triton_kernels.budget_layout import Layout


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
