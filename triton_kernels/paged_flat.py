"""paged_attention over a flat list of tiles: every program takes an equal share, whatever the lengths of the rows.

The tiles of all rows, blocks and key/value heads stand one behind another; a block in one head is a segment of the
list. How many tiles there are is counted on the device, from the positions of the queries, so the grid is fixed and the
cost follows the keys that are there: one long row among many short ones is shared by all programs. A segment that lies
in one share is written at once; of one that crosses into the next, each program leaves a partial result, and
`combine_kernel` joins them, in the order of the list: the same arguments give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qwenopt.triton_kernels.paged_tiles import attend, row_tiles, row_tokens, store_block

# What a program says of the segment that it opened and did not finish: row (-1: there is none), first token, queries,
# key/value head, last program that has a part of it.
PART_FIELDS = tl.constexpr(5)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_keys", "num_pages"])
def flat_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, starts_ptr, positions_ptr, mask_ptr, out_ptr,
    partial_ptr, lse_ptr, parts_ptr, s, num_rows, num_tokens, num_keys, num_pages, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    ROWS: tl.constexpr, MIN_TILES: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Partial results [2 * programs, BLOCK_M, BLOCK_D]: of program p, 2p is of the segment that it found open, 2p + 1
    of the one that it left open. SHORT: only rows of one block; `blocks_kernel` has the others."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    PACKED: tl.constexpr = starts_ptr is not None
    program = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    begins, counts = row_tokens(starts_ptr, rows, num_rows, num_tokens)
    if SHORT:
        counts = tl.where((counts <= BLOCK_Q) & (rows < num_rows), counts, 0)
    _, tiles = row_tiles(positions_ptr, rows, begins, counts, num_rows, num_keys, BLOCK_N, WINDOW)
    upto = tl.cumsum(tl.cdiv(counts, BLOCK_Q) * tiles * KV_HEADS, 0)
    work = tl.max(upto)
    share = tl.maximum(tl.cdiv(work, tl.num_programs(0)), MIN_TILES)
    at = program * share
    end = tl.minimum(at + share, work)
    open_row, open_token, open_queries, open_head, open_last = -1, 0, 0, 0, 0
    while at < end:
        row = tl.sum((upto <= at).to(tl.int32))
        offset = at - tl.max(tl.where(upto <= at, upto, 0))
        begin, count = row_tokens(starts_ptr, row, num_rows, num_tokens)
        first_tile, num_tiles = row_tiles(positions_ptr, row, begin, count, num_rows, num_keys, BLOCK_N, WINDOW)
        segment, tile = offset // num_tiles, offset % num_tiles
        stop = tl.minimum(tile + end - at, num_tiles)
        head, done = segment % KV_HEADS, segment // KV_HEADS * BLOCK_Q
        token, queries = begin + done, tl.minimum(count - done, BLOCK_Q)
        out, lse = attend(
            q_ptr, table_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, positions_ptr, mask_ptr, s,
            row, token, queries, head, num_rows, num_keys, num_pages, scale,
            first_tile + tile, first_tile + stop, tile == 0, stop == num_tiles,
            GROUP, PAGE, DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, MASK, PACKED, 1,
        )  # fmt: skip
        if (tile == 0) & (stop == num_tiles):
            store_block(out_ptr, out, s, row, token, queries, head, GROUP, DIM, PACKED)
        else:
            m = tl.arange(0, BLOCK_M)
            index = (2 * program + (tile == 0).to(tl.int32)) * BLOCK_M + m
            tl.store(lse_ptr + index, lse)
            tl.store(partial_ptr + index[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], out)
        open_row = tl.where((tile == 0) & (stop < num_tiles), row, -1)
        open_token, open_queries, open_head, open_last = token, queries, head, (at + num_tiles - tile - 1) // share
        at += stop - tile
    parts_ptr += program * PART_FIELDS
    tl.store(parts_ptr, open_row)
    tl.store(parts_ptr + 1, open_token)
    tl.store(parts_ptr + 2, open_queries)
    tl.store(parts_ptr + 3, open_head)
    tl.store(parts_ptr + 4, open_last)


@triton.jit
def combine_kernel(
    partial_ptr, lse_ptr, parts_ptr, out_ptr, s,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Join the parts of the segment that program `program_id(0)` opened; `program_id(1)` takes every 16th row."""
    program, dims = tl.program_id(0), tl.arange(0, BLOCK_D)
    row = tl.load(parts_ptr + program * PART_FIELDS)
    if row < 0:
        return
    token = tl.load(parts_ptr + program * PART_FIELDS + 1)
    queries = tl.load(parts_ptr + program * PART_FIELDS + 2)
    head = tl.load(parts_ptr + program * PART_FIELDS + 3)
    num_parts = tl.load(parts_ptr + program * PART_FIELDS + 4) - program + 1
    batch = (row * 0 if PACKED else row).to(tl.int64)
    for m in range(tl.program_id(1), queries * GROUP, tl.num_programs(1)):
        acc = tl.zeros((BLOCK_D,), tl.float32)
        largest, total = -float("inf"), 0.0
        for i in range(0, num_parts, BLOCK_P):
            part = i + tl.arange(0, BLOCK_P)
            index = tl.where(part == 0, 2 * program + 1, 2 * (program + part)) * BLOCK_M + m
            lse = tl.load(lse_ptr + index, mask=part < num_parts, other=-float("inf"))
            pointers = partial_ptr + index[:, None] * BLOCK_D + dims[None, :]
            x = tl.load(pointers, mask=(part < num_parts)[:, None], other=0.0)
            higher = tl.maximum(largest, tl.max(lse))
            base = tl.where(higher == -float("inf"), 0.0, higher)
            weights, shrink = tl.exp2(lse - base), tl.exp2(largest - base)
            acc = acc * shrink + tl.sum(weights[:, None] * x, 0)
            total = total * shrink + tl.sum(weights)
            largest = higher
        out = acc / tl.where(total > 0, total, 1.0)
        at = (
            batch * s.out_batch
            + (token + m // GROUP).to(tl.int64) * s.out_token
            + (head * GROUP + m % GROUP) * s.out_head
        )
        tl.store(out_ptr + at + dims, out.to(out_ptr.dtype.element_ty), mask=dims < DIM)
