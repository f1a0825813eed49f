"""rms_norm in Triton: a program norms one row, or several where there are many."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.norm_rows import block, normed


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, x_stride, num_rows, num_cols, eps, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row, col = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    keep = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < num_cols, other=0)
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=keep, other=0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * num_cols + col[None, :], normed(x, weight, num_cols, eps), mask=keep)


def launch(x: Tensor, weight: Tensor, out: Tensor, x_stride: int, eps: float) -> None:
    """Norm the rows of `x` [..., N], evenly spaced, into the contiguous `out`; weight [N]."""
    num_cols = weight.shape[0]
    num_rows = x.numel() // num_cols
    b = block(num_rows, num_cols)
    rms_norm_kernel[(triton.cdiv(num_rows, b.rows),)](
        x, weight, out, x_stride, num_rows, num_cols, eps, ROWS=b.rows, COLS=b.cols, num_warps=b.num_warps
    )
