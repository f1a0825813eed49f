"""moe_experts for many tokens: blocks of rows of one expert times tiles of its weights, in tensor cores.

The rows of a block are gathered where they are loaded and scattered where they are stored: nothing is permuted in
memory. Tiles of one block stand side by side in the grid, blocks of one expert behind one another, so that what two
programs share is in L2. Grids are upper bounds; a program without a block ends at once. They have one dimension, since
the others end at 65,535 programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenopt.triton_kernels.moe_decode import gated, weighted
from qwenopt.triton_kernels.moe_sort import BLOCK_FIELDS


@triton.jit
def _product(
    rows, keep_rows, columns, keep_columns, num_inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] products of rows [BLOCK_M] and columns [BLOCK_N], pointers to `num_inner` elements each."""
    k = tl.arange(0, BLOCK_K)
    rows, columns = rows[:, None] + k[None, :], columns[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, num_inner, BLOCK_K):
        if EVEN:
            a = tl.load(rows + start, mask=keep_rows[:, None], other=0)
            b = tl.load(columns + start, mask=keep_columns[None, :], other=0)
        else:
            inside = k < num_inner - start
            a = tl.load(rows + start, mask=keep_rows[:, None] & inside[None, :], other=0)
            b = tl.load(columns + start, mask=inside[:, None] & keep_columns[None, :], other=0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def gate_up_kernel(
    x_ptr, order_ptr, blocks_ptr, weight_ptr, hidden_ptr, num_inner, num_cols, x_stride, expert_stride, row_stride,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N / 2 of the I = `num_cols` values of a block of rows, to `hidden` [pairs, I] in the order of the list.

    The tile's columns are those of gate and of up in turn: both values that a product needs end in one thread.
    """
    tiles = tl.cdiv(2 * num_cols, BLOCK_N)
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if block >= tl.load(blocks_ptr):
        return
    blocks_ptr += 1 + block * BLOCK_FIELDS
    expert, first, count = tl.load(blocks_ptr).to(tl.int64), tl.load(blocks_ptr + 1), tl.load(blocks_ptr + 2)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tokens = tl.load(order_ptr + first + m, mask=m < count, other=0) // TOP_K
    col = tile * (BLOCK_N // 2) + n // 2
    rows = x_ptr + tokens.to(tl.int64) * x_stride
    columns = weight_ptr + expert * expert_stride + (col + n % 2 * num_cols).to(tl.int64) * row_stride
    acc = _product(rows, m < count, columns, col < num_cols, num_inner, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)
    gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
    col = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    at = hidden_ptr + (first + m).to(tl.int64)[:, None] * num_cols + col[None, :]
    tl.store(at, gated(gate, up, hidden_ptr.dtype.element_ty), mask=(m < count)[:, None] & (col < num_cols)[None, :])


@triton.jit
def down_kernel(
    hidden_ptr, order_ptr, blocks_ptr, scores_ptr, weight_ptr, rows_ptr, num_inner, num_cols,
    expert_stride, row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of the `num_cols` outputs of a block of rows, times the pairs' weights, to `rows` [pairs, num_cols]."""
    tiles = tl.cdiv(num_cols, BLOCK_N)
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if block >= tl.load(blocks_ptr):
        return
    blocks_ptr += 1 + block * BLOCK_FIELDS
    expert, first, count = tl.load(blocks_ptr).to(tl.int64), tl.load(blocks_ptr + 1), tl.load(blocks_ptr + 2)
    m, n = tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = hidden_ptr + (first + m).to(tl.int64) * num_inner
    columns = weight_ptr + expert * expert_stride + n.to(tl.int64) * row_stride
    acc = _product(rows, m < count, columns, n < num_cols, num_inner, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)
    pairs = tl.load(order_ptr + first + m, mask=m < count, other=0)
    scores = tl.load(scores_ptr + pairs, mask=m < count, other=0)
    out = weighted(acc, scores[:, None], rows_ptr.dtype.element_ty)
    at = rows_ptr + pairs.to(tl.int64)[:, None] * num_cols + n[None, :]
    tl.store(at, out, mask=(m < count)[:, None] & (n < num_cols)[None, :])


@triton.jit
def combine_kernel(
    rows_ptr, ids_ptr, out_ptr, num_cols, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of token `program_id(0)`: the sum of its rows in float32, without those of no expert here."""
    token, slot = tl.program_id(0).to(tl.int64), tl.arange(0, SLOTS)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + token * TOP_K + slot, mask=slot < TOP_K, other=num_experts)
    tl.device_assert((ids >= 0) & (ids <= num_experts), "moe_experts: an expert id is not in 0..num_experts")
    keep = ((ids >= 0) & (ids < num_experts))[:, None] & (n < num_cols)[None, :]
    rows = tl.load(rows_ptr + (token * TOP_K + slot)[:, None] * num_cols + n[None, :], mask=keep, other=0)
    out = tl.sum(rows.to(tl.float32), 0)
    tl.store(out_ptr + token * num_cols + n, out.to(out_ptr.dtype.element_ty), mask=n < num_cols)
