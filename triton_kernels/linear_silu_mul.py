"""The first half of a SwiGLU MLP in one Triton kernel: a program has the same columns of gate and up.

For few rows of x. Its tiles are half as wide as linear's, since there are two: as much is under way, and gate and up of
3072 rows are 192 programs where K is never cut.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.linear import MAX_ROWS, Tile
from qwenopt.triton_kernels.linear_group import plan as plan_group
from qwenopt.triton_kernels.linear_tiles import gemv_tile, skinny_tile


def plan(rows: int, n: int, num_sms: int) -> Tile:
    """The tile, of either weight, for 1 to 16 rows and `n` outputs on a device of so many multiprocessors."""
    tile = plan_group(rows, 2 * n, num_sms)
    return replace(tile, block_n=tile.block_n // 2)


@triton.jit
def _gated(gate, up, dtype: tl.constexpr):
    """`silu(gate) * up` of float32, rounded where eager rounds: both products, the silu, the result."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(dtype)
    return (silu.to(tl.float32) * up).to(dtype)


@triton.jit
def gated_gemv_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, num_cols, num_inner, gate_stride, up_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One row of x. BLOCK_N outputs a program."""
    first = tl.program_id(0) * BLOCK_N
    gate, up = gemv_tile(
        x_ptr, gate_ptr, up_ptr, first, num_cols, num_inner, gate_stride, up_stride, BLOCK_N, BLOCK_K, EVEN
    )
    n = tl.arange(0, BLOCK_N)
    tl.store(out_ptr + first + n, _gated(gate, up, out_ptr.dtype.element_ty), mask=n < num_cols - first)


@triton.jit
def gated_skinny_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, num_rows, num_cols, num_inner, x_stride, gate_stride, up_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """2 to 16 rows of x. BLOCK_N columns of all rows a program."""
    first = tl.program_id(0) * BLOCK_N
    gate, up = skinny_tile(
        x_ptr, gate_ptr, up_ptr, first, 0, num_inner, num_rows, num_cols, num_inner, x_stride, gate_stride, up_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN,
    )  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    keep = (m < num_rows)[:, None] & (n < num_cols - first)[None, :]
    out_ptr += m[:, None] * num_cols + first + n[None, :]
    tl.store(out_ptr, _gated(gate, up, out_ptr.dtype.element_ty), mask=keep)


def launch(tile: Tile, x: Tensor, gate_weight: Tensor, up_weight: Tensor, out: Tensor) -> None:
    """`silu(x @ gate_weight.T) * (x @ up_weight.T)` to out [M, N], contiguous; x [M, K], weights [N, K], M is 1 to 16.

    Rows of x and of the weights have unit stride. More than one row: 16-bit dtypes.
    """
    (rows, k), n = x.shape, gate_weight.shape[0]
    grid = (triton.cdiv(n, tile.block_n),)
    strides = (gate_weight.stride(0), up_weight.stride(0))
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "EVEN": k % tile.block_k == 0}
    if rows == 1:
        gated_gemv_kernel[grid](x, gate_weight, up_weight, out, n, k, *strides, num_warps=tile.num_warps, **blocks)
        return
    gated_skinny_kernel[grid](
        x, gate_weight, up_weight, out, rows, n, k, x.stride(0), *strides, BLOCK_M=MAX_ROWS, num_warps=tile.num_warps,
        num_stages=tile.num_stages, **blocks,
    )  # fmt: skip
