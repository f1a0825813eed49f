"""Two or three linear layers of one x in one Triton kernel: their tiles follow each other in the grid.

For few rows of x, where all there is to do is to read the weights. Those of queries, keys and values, say of 2048, 1024
and 1024 rows, are too few for a device each and enough together, so K is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.linear import GEMV, GEMV_WIDE, MAX_ROWS, SKINNY, SKINNY_WIDE, Tile
from qwenopt.triton_kernels.linear_tiles import gemv_tile, skinny_tile

MAX_WEIGHTS = 3


def plan(rows: int, n: int, num_sms: int) -> Tile:
    """The tile for 1 to 16 rows times weights of `n` rows in all, on a device of so many multiprocessors."""
    if rows == 1:
        return GEMV_WIDE if n >= 4 * num_sms * GEMV_WIDE.block_n else GEMV
    return SKINNY_WIDE if n >= 2 * num_sms * SKINNY_WIDE.block_n else SKINNY


@triton.jit
def _mine(tile, a, b, c, a_tiles, b_tiles):
    """Of what the three weights have, that of the weight which a tile belongs to."""
    found = a
    if tile >= a_tiles:
        found = b
    if c is not None:  # noqa: SIM102 - settled while compiling, the other at run time
        if tile >= a_tiles + b_tiles:
            found = c
    return found


@triton.jit
def _place(
    a_ptr, b_ptr, c_ptr, a_out_ptr, b_out_ptr, c_out_ptr, a_cols, b_cols, c_cols, a_stride, b_stride, c_stride,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's weight and output, their columns, the weight's stride, and the first of its columns.

    Chosen and not branched to: a product in each of three branches would have shared memory of its own.
    """
    tile, a_tiles, b_tiles = tl.program_id(0), tl.cdiv(a_cols, BLOCK_N), tl.cdiv(b_cols, BLOCK_N)
    weight_ptr = _mine(tile, a_ptr, b_ptr, c_ptr, a_tiles, b_tiles)
    out_ptr = _mine(tile, a_out_ptr, b_out_ptr, c_out_ptr, a_tiles, b_tiles)
    num_cols = _mine(tile, a_cols, b_cols, c_cols, a_tiles, b_tiles)
    stride = _mine(tile, a_stride, b_stride, c_stride, a_tiles, b_tiles)
    begin = _mine(tile, 0, a_tiles, a_tiles + b_tiles, a_tiles, b_tiles)
    return weight_ptr, out_ptr, num_cols, stride, (tile - begin) * BLOCK_N


@triton.jit
def group_gemv_kernel(
    x_ptr, a_ptr, b_ptr, c_ptr, a_out_ptr, b_out_ptr, c_out_ptr, a_cols, b_cols, c_cols, num_inner,
    a_stride, b_stride, c_stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One row of x. BLOCK_N outputs of one of the weights a program."""
    weight_ptr, out_ptr, num_cols, stride, first = _place(
        a_ptr, b_ptr, c_ptr, a_out_ptr, b_out_ptr, c_out_ptr, a_cols, b_cols, c_cols, a_stride, b_stride, c_stride,
        BLOCK_N,
    )  # fmt: skip
    out, _ = gemv_tile(x_ptr, weight_ptr, None, first, num_cols, num_inner, stride, 0, BLOCK_N, BLOCK_K, EVEN)
    n = tl.arange(0, BLOCK_N)
    tl.store(out_ptr + first + n, out.to(out_ptr.dtype.element_ty), mask=n < num_cols - first)


@triton.jit
def group_skinny_kernel(
    x_ptr, a_ptr, b_ptr, c_ptr, a_out_ptr, b_out_ptr, c_out_ptr, num_rows, a_cols, b_cols, c_cols, num_inner, x_stride,
    a_stride, b_stride, c_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """2 to 16 rows of x. BLOCK_N columns of one of the weights a program."""
    weight_ptr, out_ptr, num_cols, stride, first = _place(
        a_ptr, b_ptr, c_ptr, a_out_ptr, b_out_ptr, c_out_ptr, a_cols, b_cols, c_cols, a_stride, b_stride, c_stride,
        BLOCK_N,
    )  # fmt: skip
    acc, _ = skinny_tile(
        x_ptr, weight_ptr, None, first, 0, num_inner, num_rows, num_cols, num_inner, x_stride, stride, 0,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN,
    )  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    keep = (m < num_rows)[:, None] & (n < num_cols - first)[None, :]
    tl.store(out_ptr + m[:, None] * num_cols + first + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=keep)


def launch(tile: Tile, x: Tensor, weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """x [M, K] times two or three weights [N, K] transposed, to outs [M, N], contiguous; M is 1 to 16.

    Rows of x and of the weights have unit stride; no N is 0. More than one row: 16-bit dtypes.
    """
    rows, k = x.shape
    missing = MAX_WEIGHTS - len(weights)
    pointers = (*weights, *[None] * missing, *outs, *[None] * missing)
    cols = [*(w.shape[0] for w in weights), *[0] * missing]
    strides = [*(w.stride(0) for w in weights), *[0] * missing]
    grid = (sum(triton.cdiv(n, tile.block_n) for n in cols),)
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "EVEN": k % tile.block_k == 0}
    if rows == 1:
        group_gemv_kernel[grid](x, *pointers, *cols, k, *strides, num_warps=tile.num_warps, **blocks)
        return
    group_skinny_kernel[grid](
        x, *pointers, rows, *cols, k, x.stride(0), *strides, BLOCK_M=MAX_ROWS, num_warps=tile.num_warps,
        num_stages=tile.num_stages, **blocks,
    )  # fmt: skip
