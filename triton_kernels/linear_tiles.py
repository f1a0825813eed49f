"""Tiles of `x @ weight.T` in Triton, for the kernels of few rows: one weight, or two that share the rows of x.

With two, both are read in the same loop, so that x is read once and twice as many loads are under way.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _read(pointers, keep, inside, EVEN: tl.constexpr):
    """Numbers of a weight, which nobody reads again. EVEN: none is behind the end of its row."""
    if EVEN:
        return tl.load(pointers, mask=keep, other=0, eviction_policy="evict_first")
    return tl.load(pointers, mask=keep & inside, other=0, eviction_policy="evict_first")


@triton.jit
def gemv_tile(
    x_ptr, weight_ptr, other_ptr, first, num_cols, num_inner, weight_stride, other_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One row of x times rows `first` on of a weight, and of another one if that is not None: float32 [BLOCK_N] each.

    EVEN: no tile ends behind a row of the weight.
    """
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    keep = (n < num_cols - first)[:, None]
    weights = weight_ptr + first.to(tl.int64) * weight_stride + n[:, None].to(tl.int64) * weight_stride + k[None, :]
    acc, other_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if other_ptr is not None:
        others = other_ptr + first.to(tl.int64) * other_stride + n[:, None].to(tl.int64) * other_stride + k[None, :]
    for start in range(0, num_inner, BLOCK_K):
        inside = k < num_inner - start
        if EVEN:
            x = tl.load(x_ptr + start + k).to(tl.float32)[None, :]
        else:
            x = tl.load(x_ptr + start + k, mask=inside, other=0).to(tl.float32)[None, :]
        weight = _read(weights + start, keep, inside[None, :], EVEN)
        if other_ptr is not None:
            other = _read(others + start, keep, inside[None, :], EVEN)
            other_acc += other.to(tl.float32) * x
        acc += weight.to(tl.float32) * x
    return tl.sum(acc, 1), tl.sum(other_acc, 1)


@triton.jit
def skinny_tile(
    x_ptr, weight_ptr, other_ptr, first, begin, end, num_rows, num_cols, num_inner, x_stride, weight_stride,
    other_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The same for BLOCK_M rows of x, over columns `begin` to `end`: float32 [BLOCK_M, BLOCK_N] each."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows, keep = (m < num_rows)[:, None], (n < num_cols - first)[None, :]
    weights = weight_ptr + first.to(tl.int64) * weight_stride + n[None, :].to(tl.int64) * weight_stride + k[:, None]
    xs = x_ptr + m[:, None].to(tl.int64) * x_stride + k[None, :]
    acc, other_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if other_ptr is not None:
        others = other_ptr + first.to(tl.int64) * other_stride + n[None, :].to(tl.int64) * other_stride + k[:, None]
    for start in range(begin, end, BLOCK_K):
        inside = k < num_inner - start
        if EVEN:
            x = tl.load(xs + start, mask=rows, other=0)
        else:
            x = tl.load(xs + start, mask=rows & inside[None, :], other=0)
        weight = _read(weights + start, keep, inside[:, None], EVEN)
        if other_ptr is not None:
            other = _read(others + start, keep, inside[:, None], EVEN)
            other_acc = tl.dot(x, other, other_acc)
        acc = tl.dot(x, weight, acc)
    return acc, other_acc
