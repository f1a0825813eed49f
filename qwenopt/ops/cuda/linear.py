"""linear on a GPU: up to 16 rows by a kernel that reads the weight once; more are cuBLAS's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import cpu
from qwenopt.ops.cuda import DTYPES
from qwenopt.ops.cuda.launch import WARP, Launch, Run, dtype_name, pack

MAX_ROWS = 16
TILE_ROWS, TILE_THREADS, DOT_THREADS = 16, 256, 128
ALIGNMENT = 16  # bytes that a lane reads at once
DOT_ROWS = (1, 4, 16)


def accepts(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if weight.stride(0) < weight.shape[1] and weight.shape[0] > 1:
        return f"weight has stride {weight.stride(0)} between rows of {weight.shape[1]}"
    return cpu.one_dtype(x, weight, bias, among=DTYPES) or cpu.last_dim_contiguous(weight=weight)


def rows_of(x: Tensor) -> Tensor:
    """`x` [..., K] as rows of one stride: itself where it has one, else a copy."""
    return x if cpu.row_stride(x) is not None else x.contiguous()


def in_tiles(x: Tensor, weight: Tensor) -> bool:
    """Whether matrix instructions can take these rows: bfloat16, every row at a multiple of 16 bytes."""
    size = ALIGNMENT // x.element_size()
    strides = (weight.shape[1], cpu.row_stride(x), weight.stride(0))
    return (
        x.dtype == torch.bfloat16
        and x.data_ptr() % ALIGNMENT == 0
        and weight.data_ptr() % ALIGNMENT == 0
        and all(stride % size == 0 for stride in strides)
    )


def args_of(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> bytes:
    """The struct LinearArgs."""
    n, k = weight.shape
    return pack(x, weight, bias, out, x.numel() // k, n, k, cpu.row_stride(x), weight.stride(0), n)


def linear(run: Run, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    if not (0 < rows <= MAX_ROWS and n):
        return F.linear(x, weight, bias)
    x = rows_of(x)
    bias = bias if bias is None else bias.contiguous()
    out = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    args = args_of(x, weight, bias, out)
    if in_tiles(x, weight):
        tokens = 8 if rows <= 8 else 16
        run(Launch(f"linear_bfloat16_{tokens}", (-(-n // TILE_ROWS), 1, 1), TILE_THREADS, args))
    else:
        fitting = next(count for count in DOT_ROWS if rows <= count)
        grid = (-(-n * WARP // DOT_THREADS), 1, 1)
        run(Launch(f"linear_dot_{dtype_name(x)}_{fitting}", grid, DOT_THREADS, args))
    return out
