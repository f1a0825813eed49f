"""add_rms_norm in Triton: rms_norm of a sum, which is written, too."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.norm_rows import block, normed


@triton.jit(do_not_specialize=["num_rows"])
def add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, x_stride, residual_stride, num_rows, num_cols, eps,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    keep = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < num_cols, other=0)
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=keep, other=0)
    residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=keep, other=0)
    total = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
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
    num_cols = weight.shape[0]
    num_rows = x.numel() // num_cols
    b = block(num_rows, num_cols)
    add_rms_norm_kernel[(triton.cdiv(num_rows, b.rows),)](
        x, residual, weight, out, total, x_stride, residual_stride, num_rows, num_cols, eps,
        ROWS=b.rows, COLS=b.cols, num_warps=b.num_warps,
    )  # fmt: skip
