"""rms_norm by the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import one_dtype, row_stride, rows, unit_strides

MAX_COLS = 16384


def accepts_norm(weight: Tensor, **inputs: Tensor) -> str | None:
    """None when a kernel can norm these, else the reason."""
    if weight.shape[0] > MAX_COLS:
        return f"rows of {weight.shape[0]} (the kernel has up to {MAX_COLS})"
    tensors = {**inputs, "weight": weight}
    return one_device(**tensors) or one_dtype(**tensors) or rows(**inputs) or unit_strides(weight=weight)


def accepts(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return accepts_norm(weight, x=x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from qwenopt.triton_kernels.rms_norm import launch

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            launch(x, weight, out, row_stride(x) or 0, eps)
    return out
