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


def on_kernel(x: Tensor) -> bool:
    """Whether products of the rows of `x` [..., K] go to a kernel, not to cuBLAS."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return rows == 1 or (1 < rows <= MAX_ROWS and x.dtype != torch.float32)


def rows_of(x: Tensor) -> Tensor:
    """`x` [..., K] as rows [M, K] of unit stride: where it lies, or a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return planned_linear(torch.cuda.get_device_properties(x.device).multi_processor_count, x, weight, bias)


def planned_linear(num_sms: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` as it is run on a device of so many multiprocessors."""
    if (parts := planned_parts(num_sms, x, weight)) is not None:
        from qwenopt.triton_kernels.linear import launch_sum

        out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            launch_sum(parts, bias, out)
        return out
    n, k = weight.shape
    if n == 0 or not on_kernel(x):
        return F.linear(x, weight, bias)
    from qwenopt.triton_kernels.linear import launch, plan

    flat = rows_of(x)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        launch(plan(len(flat), n, k, num_sms), flat, weight, bias, out)
    return out


def planned_parts(num_sms: int, x: Tensor, weight: Tensor) -> Tensor | None:
    """What adds up to `x @ weight.T`, float32 [parts, rows, N], where K is cut to fill the device; else None."""
    n, k = weight.shape
    if n == 0 or not on_kernel(x):
        return None
    from qwenopt.triton_kernels.linear import launch_parts, plan

    flat = rows_of(x)
    p = plan(len(flat), n, k, num_sms)
    if p.splits < 2:
        return None
    parts = torch.empty(p.splits, len(flat), n, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        launch_parts(p, flat, weight, parts)
    return parts
