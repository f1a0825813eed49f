"""budget_guard by the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.cpu import contiguous
from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import DTYPES, dtypes, unit_strides
from qwenopt.ops.triton.budget_layout import layout


def accepts(logits: Tensor, state: Tensor, ids: Tensor) -> str | None:
    return (
        one_device(logits=logits, state=state, ids=ids)
        or dtypes(DTYPES, logits=logits)
        or unit_strides(logits=logits)
        or contiguous(state=state, ids=ids)
    )


def budget_guard(logits: Tensor, state: Tensor, ids: Tensor) -> None:
    from qwenopt.triton_kernels.budget_guard import launch

    if logits.numel():
        with torch.cuda.device_of(logits):
            launch(layout(), logits, state, ids)
