"""linear in Triton for few rows, where all there is to do is to read the weight once: which kernel, which tiles.

One row: `gemv_kernel`, products in float32 on vectors, 16 bytes a load; no dimension of the product is padded and no
shared memory stands between the loads and the sums. 2 to 16 rows: `skinny_kernel`, one padded tile of 16 rows times
tiles of the weight, which arrive in shared memory several steps ahead. Where N has too few tiles for the device, K is
shared out, too, and `combine_kernel` adds the parts in their order: the same arguments give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.linear_tiles import gemv_tile, skinny_tile

MAX_ROWS = 16


@dataclass(frozen=True)
class Tile:
    """Columns of the output and of the inner dimension in a tile, and how the compiler is to spread them."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Not tuned on a device. A warp reads 256 elements of a row at once. Large N: four rows for each warp; small N: four
# rows for all four warps, which makes four times as many programs.
GEMV_WIDE, GEMV = Tile(16, 256, 4, 1), Tile(4, 1024, 4, 1)
# 80 and 60 KB of shared memory: what Hopper's multiprocessors need in flight to draw their share of the bandwidth is a
# third of that, and any GPU from compute capability 8.0 on has 99 KB.
SKINNY_WIDE, SKINNY = Tile(64, 128, 4, 4), Tile(32, 128, 4, 5)
MIN_STEPS = 2  # of a part of K: a shorter one costs more to start and to combine than it saves


@dataclass(frozen=True)
class Plan:
    """What a call launches: the tile, and the parts that K is cut into (0: `gemv_kernel`)."""

    tile: Tile
    splits: int


def plan(rows: int, n: int, k: int, num_sms: int) -> Plan:
    """The launches for 1 to 16 rows of K times the weight [N, K] on a device of so many multiprocessors."""
    if rows == 1:
        return Plan(GEMV_WIDE if n >= 4 * num_sms * GEMV_WIDE.block_n else GEMV, 0)
    if n >= 2 * num_sms * SKINNY_WIDE.block_n:
        return Plan(SKINNY_WIDE, 1)
    tiles = triton.cdiv(n, SKINNY.block_n)
    wanted = triton.cdiv(9 * num_sms, 10 * tiles)  # nine tenths of the device busy: no second launch for the rest
    return Plan(SKINNY, max(1, min(wanted, triton.cdiv(k, SKINNY.block_k) // MIN_STEPS)))


@triton.jit
def gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_cols, num_inner, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs a program."""
    first = tl.program_id(0) * BLOCK_N
    out, _ = gemv_tile(x_ptr, weight_ptr, None, first, num_cols, num_inner, weight_stride, 0, BLOCK_N, BLOCK_K, EVEN)
    n = tl.arange(0, BLOCK_N)
    keep = n < num_cols - first
    if bias_ptr is not None:
        out += tl.load(bias_ptr + first + n, mask=keep, other=0).to(tl.float32)
    tl.store(out_ptr + first + n, out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def skinny_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, parts_ptr, num_rows, num_cols, num_inner, x_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of all rows over part `program_id(1)` of K; to the parts [SPLITS, rows, N] if it is cut."""
    first, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    share = tl.cdiv(tl.cdiv(num_inner, BLOCK_K), SPLITS) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, num_inner)
    acc, _ = skinny_tile(
        x_ptr, weight_ptr, None, first, begin, end, num_rows, num_cols, num_inner, x_stride, weight_stride, 0,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN,
    )  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols = n < num_cols - first
    keep = (m < num_rows)[:, None] & cols[None, :]
    at = m[:, None] * num_cols + first + n[None, :]
    if SPLITS > 1:
        tl.store(parts_ptr + split.to(tl.int64) * num_rows * num_cols + at, acc, mask=keep)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + first + n, mask=cols, other=0).to(tl.float32)[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def sum_of_parts(pointers, keep, stride, SPLITS: tl.constexpr):
    """The sum of SPLITS tiles that lie `stride` apart, in their order."""
    acc = tl.load(pointers, mask=keep, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(pointers + split * stride, mask=keep, other=0.0)
    return acc


@triton.jit
def combine_kernel(
    parts_ptr, bias_ptr, out_ptr, num_rows, num_cols, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the parts of BLOCK outputs of row `program_id(1)`, and the bias."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < num_cols
    at = tl.program_id(1) * num_cols + n
    acc = sum_of_parts(parts_ptr + at, keep, num_rows.to(tl.int64) * num_cols, SPLITS)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=keep, other=0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)


def launch(p: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x [M, K] times weight [N, K] transposed, plus bias [N], to out [M, N], contiguous; M is 1 to 16.

    Rows of x and of the weight have unit stride. More than one row: 16-bit dtypes. For plans that do not cut K.
    """
    if p.splits:
        _launch_skinny(p, x, weight, bias, out, None)
        return
    k, n, tile = x.shape[1], weight.shape[0], p.tile
    gemv_kernel[(triton.cdiv(n, tile.block_n),)](
        x, weight, bias, out, n, k, weight.stride(0), BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        EVEN=k % tile.block_k == 0, num_warps=tile.num_warps,
    )  # fmt: skip


def launch_parts(p: Plan, x: Tensor, weight: Tensor, parts: Tensor) -> None:
    """The same without a bias for plans that cut K: to parts float32 [splits, M, N], contiguous."""
    _launch_skinny(p, x, weight, None, None, parts)


def _launch_skinny(
    p: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, parts: Tensor | None
) -> None:
    (rows, k), n, tile = x.shape, weight.shape[0], p.tile
    skinny_kernel[(triton.cdiv(n, tile.block_n), p.splits)](
        x, weight, bias, out, parts, rows, n, k, x.stride(0), weight.stride(0), BLOCK_M=MAX_ROWS, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, SPLITS=p.splits, EVEN=k % tile.block_k == 0, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip


def launch_sum(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The sum of parts [splits, M, N], plus bias [N], to out [M, N], contiguous."""
    splits, rows, n = parts.shape
    combine_kernel[(triton.cdiv(n, 256), rows)](parts, bias, out, rows, n, SPLITS=splits, BLOCK=256)
