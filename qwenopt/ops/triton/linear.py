"""linear by the Triton kernels where reading the weight is all there is to do, and by torch (cuBLAS) for more rows.

The number of rows decides inside the provider, not at compile time, so that one graph serves every batch. From 17 rows
on a product is cuBLAS's own ground, and float32, which has no tensor cores without losing digits, is for more than one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import one_dtype, unit_strides

MAX_ROWS = 16


def accepts(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    tensors = {"x": x, "weight": weight, "bias": bias}
    return one_device(**tensors) or one_dtype(**tensors) or unit_strides(weight=weight, bias=bias)


def _on_kernel(rows: int, x: Tensor) -> bool:
    return rows == 1 or (1 < rows <= MAX_ROWS and x.dtype != torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return planned_linear(torch.cuda.get_device_properties(x.device).multi_processor_count, x, weight, bias)


def planned_linear(num_sms: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` as it is run on a device of so many multiprocessors."""
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    if n == 0 or not _on_kernel(rows, x):
        return F.linear(x, weight, bias)
    from qwenopt.triton_kernels.linear import launch, plan, workspace

    p = plan(rows, n, k, num_sms)
    flat = x.reshape(rows, k)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    size = workspace(p, rows, n)
    partial = torch.empty(size, dtype=torch.float32, device=x.device) if size else None
    with torch.cuda.device_of(x):
        launch(p, flat, weight, bias, out, partial)
    return out
