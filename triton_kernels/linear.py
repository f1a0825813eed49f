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


def workspace(p: Plan, rows: int, n: int) -> int:
    """How many float32 `launch` needs for itself."""
    return p.splits * rows * n if p.splits > 1 else 0


@triton.jit
def gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_cols, num_inner, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs a program. EVEN: no tile ends behind a row of the weight."""
    first = tl.program_id(0) * BLOCK_N
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    keep = n < num_cols - first
    weight_ptr += first.to(tl.int64) * weight_stride
    pointers = weight_ptr + n[:, None].to(tl.int64) * weight_stride + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, num_inner, BLOCK_K):
        if EVEN:
            x = tl.load(x_ptr + start + k)
            weight = tl.load(pointers + start, mask=keep[:, None], other=0, eviction_policy="evict_first")
        else:
            inside = k < num_inner - start
            x = tl.load(x_ptr + start + k, mask=inside, other=0)
            mask = keep[:, None] & inside[None, :]
            weight = tl.load(pointers + start, mask=mask, other=0, eviction_policy="evict_first")
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(acc, 1)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + first + n, mask=keep, other=0).to(tl.float32)
    tl.store(out_ptr + first + n, out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def skinny_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, partial_ptr, num_rows, num_cols, num_inner, x_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of all rows over part `program_id(1)` of K; partial results [SPLITS, rows, N] if there are."""
    first, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    share = tl.cdiv(tl.cdiv(num_inner, BLOCK_K), SPLITS) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, num_inner)
    rows, cols = m < num_rows, n < num_cols - first
    weight_ptr += first.to(tl.int64) * weight_stride
    weights = weight_ptr + n[None, :].to(tl.int64) * weight_stride + k[:, None]
    xs = x_ptr + m[:, None].to(tl.int64) * x_stride + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        if EVEN:
            x = tl.load(xs + start, mask=rows[:, None], other=0)
            weight = tl.load(weights + start, mask=cols[None, :], other=0, eviction_policy="evict_first")
        else:
            inside = k < num_inner - start
            x = tl.load(xs + start, mask=rows[:, None] & inside[None, :], other=0)
            mask = inside[:, None] & cols[None, :]
            weight = tl.load(weights + start, mask=mask, other=0, eviction_policy="evict_first")
        acc = tl.dot(x, weight, acc)
    keep = rows[:, None] & cols[None, :]
    at = m[:, None] * num_cols + first + n[None, :]
    if SPLITS > 1:
        tl.store(partial_ptr + split.to(tl.int64) * num_rows * num_cols + at, acc, mask=keep)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + first + n, mask=cols, other=0).to(tl.float32)[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def combine_kernel(
    partial_ptr, bias_ptr, out_ptr, num_rows, num_cols, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the parts of BLOCK outputs of row `program_id(1)`, and the bias."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = n < num_cols
    at = tl.program_id(1) * num_cols + n
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + split * num_rows.to(tl.int64) * num_cols + at, mask=keep, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=keep, other=0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)


def launch(p: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, partial: Tensor | None) -> None:
    """x [M, K] times weight [N, K] transposed, plus bias [N], to out [M, N], contiguous; M is 1 to 16.

    Rows of x and of the weight have unit stride. More than one row: 16-bit dtypes. `partial` as `workspace` says.
    """
    (rows, k), n, tile = x.shape, weight.shape[0], p.tile
    grid = triton.cdiv(n, tile.block_n)
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "num_warps": tile.num_warps}
    if p.splits == 0:
        even = k % tile.block_k == 0
        gemv_kernel[(grid,)](x, weight, bias, out, n, k, weight.stride(0), EVEN=even, **blocks)
        return
    skinny_kernel[(grid, p.splits)](
        x, weight, bias, out, partial, rows, n, k, x.stride(0), weight.stride(0), BLOCK_M=MAX_ROWS, SPLITS=p.splits,
        EVEN=k % tile.block_k == 0, num_stages=tile.num_stages, **blocks,
    )  # fmt: skip
    if p.splits > 1:
        combine_kernel[(triton.cdiv(n, 256), rows)](partial, bias, out, rows, n, SPLITS=p.splits, BLOCK=256)
