"""add_rms_norm in Triton: rms_norm of a sum, which is written, too.

What is added may still be in parts, as a product comes whose inner dimension was cut: they are added up, and rounded,
on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.linear import sum_of_parts
from qwenopt.triton_kernels.norm_rows import block, normed


@triton.jit(do_not_specialize=["num_rows"])
def add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, x_stride, residual_stride, num_rows, num_cols, eps,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program. PARTS: x is so many float32 [rows, N] to add up, each with rows `x_stride` apart."""
    row, col = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    keep = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < num_cols, other=0)
    x_ptr += row[:, None] * x_stride + col[None, :]
    residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=keep, other=0)
    if PARTS == 1:
        x = tl.load(x_ptr, mask=keep, other=0)
    else:
        x = sum_of_parts(x_ptr, keep, num_rows.to(tl.int64) * x_stride, PARTS).to(residual.dtype)
    total = (residual.to(tl.float32) + x.to(tl.float32)).to(residual.dtype)
    at = row[:, None] * num_cols + col[None, :]
    tl.store(total_ptr + at, total, mask=keep)
    tl.store(out_ptr + at, normed(total.to(tl.float32), weight, num_cols, eps), mask=keep)


def launch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    x_stride: int,
    residual_stride: int,
    eps: float,
) -> None:
    """Write `x + residual` [..., N], of evenly spaced rows, to `total` and its norm to `out`, both contiguous."""
    _launch(x, 1, x.numel() // weight.shape[0], residual, weight, out, total, x_stride, residual_stride, eps)


def launch_parts(
    parts: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, residual_stride: int, eps: float
) -> None:
    """The same for an x that is the sum of parts float32 [parts, rows, N], contiguous, in the dtype of the others."""
    num_parts, num_rows, num_cols = parts.shape
    _launch(parts, num_parts, num_rows, residual, weight, out, total, num_cols, residual_stride, eps)


def _launch(
    x: Tensor,
    num_parts: int,
    num_rows: int,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    x_stride: int,
    residual_stride: int,
    eps: float,
) -> None:
    num_cols = weight.shape[0]
    b = block(num_rows, num_cols)
    add_rms_norm_kernel[(triton.cdiv(num_rows, b.rows),)](
        x, residual, weight, out, total, x_stride, residual_stride, num_rows, num_cols, eps,
        ROWS=b.rows, COLS=b.cols, PARTS=num_parts, num_warps=b.num_warps,
    )  # fmt: skip
