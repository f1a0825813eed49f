"""silu_mul by the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import one_dtype, row_stride, rows


def accepts(gate: Tensor, up: Tensor) -> str | None:
    return one_device(gate=gate, up=up) or one_dtype(gate=gate, up=up) or rows(gate=gate, up=up)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    from qwenopt.triton_kernels.silu_mul import launch

    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        with torch.cuda.device_of(gate):
            launch(gate, up, out, row_stride(gate) or 0, row_stride(up) or 0)
    return out
