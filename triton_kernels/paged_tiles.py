"""What the kernels of paged attention share: tokens of a row, tiles of keys read through a block table, the softmax.

A block is BLOCK_Q = BLOCK_M // GROUP queries times the GROUP query heads of one key/value head, so that a tile of keys
is read once for all of them. Row m of a block is query m // GROUP in head m % GROUP. A tile is BLOCK_N keys of a row;
where a page holds whole tiles, the block table is read once for each, else once for each key. Without a block table
(None) the keys of row r are page r of the pool, whole, whatever its length.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Strides(NamedTuple):
    """Strides in elements; those of head_dim are 1, that of the block table's pages too. No mask, no scales: 0."""

    q_batch: int
    q_head: int
    q_token: int
    out_batch: int
    out_head: int
    out_token: int
    pool_page: int
    pool_head: int
    pool_place: int
    scale_page: int
    scale_head: int
    scale_place: int
    table: int
    mask_batch: int
    mask_head: int
    mask_query: int
    mask_key: int


@triton.jit
def row_tokens(starts_ptr, row, num_rows, num_tokens):
    """First token and number of tokens of `row`, a number or a vector of them.

    Packed rows (`starts_ptr`): row `num_rows` stands for the tokens behind the last row. Otherwise each row has
    `num_tokens`, counted from 0.
    """
    if starts_ptr is None:
        begin = row * 0
        count = tl.where(row < num_rows, num_tokens, 0)
    else:
        begin = tl.load(starts_ptr + row, mask=(row > 0) & (row <= num_rows), other=0)
        end = tl.load(starts_ptr + row + 1, mask=row < num_rows, other=num_tokens)
        count = tl.maximum(tl.minimum(end, num_tokens) - begin, 0)
        count = tl.where(row <= num_rows, count, 0)
    return begin, count


@triton.jit
def row_tiles(positions_ptr, row, begin, count, num_rows, num_keys, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """First tile and number of tiles (1 at least) that the last token of a row sees: what its other tokens see, too,
    give or take a tile."""
    if positions_ptr is None:
        last = row * 0 + num_keys - 1
    else:
        last = tl.load(positions_ptr + begin + count - 1, mask=(count > 0) & (row < num_rows), other=-1)
        last = tl.minimum(tl.maximum(last, -1), num_keys - 1).to(tl.int32)
    first = last * 0
    if WINDOW > 0:
        first = tl.maximum(last - WINDOW + 1, 0) // BLOCK_N
    return first, tl.maximum(tl.cdiv(last + 1, BLOCK_N) - first, 1)


@triton.jit
def _load(
    pool_ptr, scale_ptr, page, place, seen, s,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_N, BLOCK_D] of one head in `dtype`; 0 for what is not `seen`: a NaN there would spread."""
    dims = tl.arange(0, BLOCK_D)
    pointers = pool_ptr + (page * s.pool_page + place * s.pool_place)[:, None] + dims[None, :]
    if DIM != BLOCK_D:
        x = tl.load(pointers, mask=seen[:, None] & (dims < DIM)[None, :], other=0)
    elif MASKED:
        x = tl.load(pointers, mask=seen[:, None], other=0)
    else:
        x = tl.load(pointers)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + page * s.scale_page + place * s.scale_place, mask=seen, other=0.0)
        x = (x.to(tl.float32) * scale[:, None]).to(dtype)
    return x


@triton.jit
def _hide(
    scores, keys, positions, seen_keys, mask_row, s, LOG2E: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """-inf in `scores` [BLOCK_M, BLOCK_N] (base 2) where a query does not see a key; additive masks added."""
    visible = keys[None, :] <= positions[:, None]
    if WINDOW > 0:
        visible = visible & (keys[None, :] > positions[:, None] - WINDOW) & (keys < seen_keys)[None, :]
    if MASK != "none":
        pointers = mask_row[:, None] + keys[None, :] * s.mask_key
        if MASK == "bool":
            visible = visible & (tl.load(pointers, mask=visible, other=0) != 0)
        else:
            scores += tl.load(pointers, mask=visible, other=0.0).to(tl.float32) * LOG2E
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def _tiles(
    acc, largest, total, q, positions, mask_row, first, last, seen_keys,
    table_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, s, num_pages, scale, LOG2E: tl.constexpr,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles `first` to `last` taken into the running softmax: acc [BLOCK_M, BLOCK_D], largest and total [BLOCK_M]."""
    for tile in range(first, last):
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = keys < seen_keys
        if table_ptr is None:
            page, place = 0, keys.to(tl.int64)  # the pointers are those of the row's page
        else:
            if PAGE % BLOCK_N == 0:
                page = tl.load(table_ptr + tile * BLOCK_N // PAGE)
            else:
                page = tl.load(table_ptr + keys // PAGE, mask=seen, other=0)
            # Whatever the table says, stay in the pool.
            page, place = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64), keys % PAGE
        k = _load(k_ptr, k_scale_ptr, page, place, seen, s, DIM, acc.shape[1], MASKED, q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            scores = _hide(scores, keys, positions, seen_keys, mask_row, s, LOG2E, WINDOW, MASK)
        higher = tl.maximum(largest, tl.max(scores, 1))
        base = higher
        if MASKED:
            base = tl.where(higher == -float("inf"), 0.0, higher)  # a query that has seen no key yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        v = _load(v_ptr, v_scale_ptr, page, place, seen, s, DIM, acc.shape[1], MASKED, q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        largest = higher
    return acc, largest, total


@triton.jit
def attend(
    q_ptr, table_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, positions_ptr, mask_ptr, s,
    row, token, queries, head, num_rows, num_keys, num_pages, scale, begin, end, is_first, is_last,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, PACKED: tl.constexpr, PHASES: tl.constexpr,
):  # fmt: skip
    """Attention of one block over tiles `begin` to `end` of its row: out [BLOCK_M, BLOCK_D], logsumexp [BLOCK_M].

    The block is `queries` queries from `token` on, in the query heads of key/value head `head`. The first part of a row
    (`is_first`) also takes the tiles before `begin` that the block sees, the last one (`is_last`) those behind `end`.
    The logsumexp is in base 2, -inf where a query sees no key; `out` is 0 there.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    m, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    valid, tokens, heads = m // GROUP < queries, token + m // GROUP, head * GROUP + m % GROUP
    batch = (row * 0 if PACKED else row).to(tl.int64)
    if positions_ptr is None:
        positions = tl.where(valid, num_keys - 1, -1)
    else:
        positions = tl.load(positions_ptr + tokens, mask=valid & (row < num_rows), other=-1)
        # A position past the end sees all keys, or of a window what of it lies before the end.
        positions = tl.minimum(tl.maximum(positions, -1), num_keys - 1 + WINDOW).to(tl.int32)
    least = tl.min(tl.where(valid, positions, num_keys))
    seen_keys = tl.minimum(tl.max(positions) + 1, num_keys)
    low = 0 if WINDOW == 0 else tl.maximum(least - WINDOW + 1, 0) // BLOCK_N
    high = tl.cdiv(seen_keys, BLOCK_N)
    begin = tl.where(is_first, low, tl.maximum(begin, low))
    end = tl.where(is_last, high, tl.minimum(end, high))
    at = batch * s.q_batch + tokens.to(tl.int64) * s.q_token + heads * s.q_head
    q = tl.load(q_ptr + at[:, None] + dims[None, :], mask=valid[:, None] & (dims < DIM)[None, :], other=0)
    mask_row = positions
    if MASK != "none":
        mask_row = mask_ptr + batch * s.mask_batch + tokens.to(tl.int64) * s.mask_query + heads * s.mask_head
    at = head * s.pool_head
    if table_ptr is None:
        at += row.to(tl.int64) * s.pool_page
    else:
        table_ptr += row.to(tl.int64) * s.table
    k_ptr, v_ptr = k_ptr + at, v_ptr + at
    if k_scale_ptr is not None:
        k_scale_ptr, v_scale_ptr = k_scale_ptr + head * s.scale_head, v_scale_ptr + head * s.scale_head
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if PHASES == 2:  # tiles that every query sees whole need no comparisons
        full = tl.minimum((least + 1) // BLOCK_N, end)
        acc, largest, total = _tiles(
            acc, largest, total, q, positions, mask_row, begin, full, seen_keys,
            table_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, s, num_pages, scale * LOG2E, LOG2E,
            PAGE, DIM, BLOCK_N, WINDOW, MASK, False,
        )  # fmt: skip
        begin = tl.maximum(begin, full)
    acc, largest, total = _tiles(
        acc, largest, total, q, positions, mask_row, begin, end, seen_keys,
        table_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, s, num_pages, scale * LOG2E, LOG2E,
        PAGE, DIM, BLOCK_N, WINDOW, MASK, True,
    )  # fmt: skip
    some = total > 0
    out = acc / tl.where(some, total, 1.0)[:, None]
    return out, tl.where(some, largest + tl.log2(tl.where(some, total, 1.0)), -float("inf"))


@triton.jit
def store_block(
    out_ptr, out, s, row, token, queries, head,
    GROUP: tl.constexpr, DIM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write `out` [BLOCK_M, BLOCK_D] of a block to its places."""
    m, dims = tl.arange(0, out.shape[0]), tl.arange(0, out.shape[1])
    batch = (row * 0 if PACKED else row).to(tl.int64)
    at = batch * s.out_batch + (token + m // GROUP).to(tl.int64) * s.out_token + (head * GROUP + m % GROUP) * s.out_head
    keep = (m // GROUP < queries)[:, None] & (dims < DIM)[None, :]
    tl.store(out_ptr + at[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=keep)
