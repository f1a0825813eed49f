"""Pairs of tokens and experts in the order of the experts: a counting sort on the device, in two kernels.

The pairs are cut into one run for each program. `count_kernel` counts the experts of each run; from all counts,
`place_kernel` knows where the pairs of a run begin in each expert's part of the list. Pairs keep their order and no
atomic is used: the same ids give the same list. Ids of no expert here (`num_experts`, or a mistake) are left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

RUN = 128  # pairs that a program takes at a time
MAX_PROGRAMS = 64  # each reads the counts of all
# What is kept of a block of rows: its expert, its first row in the list, how many rows the expert has from there on.
BLOCK_FIELDS = tl.constexpr(3)


@triton.jit
def _experts(ids_ptr, pair, end, num_experts):
    """The experts of pairs, `num_experts` for what is left out."""
    ids = tl.load(ids_ptr + pair, mask=pair < end, other=num_experts)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs", "share"])
def count_kernel(
    ids_ptr, counts_ptr, num_pairs, share, num_experts, RUN: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    """counts [programs, EXPERTS] of `share` pairs each, EXPERTS > num_experts."""
    program, experts = tl.program_id(0), tl.arange(0, EXPERTS)
    begin = program * share
    end = tl.minimum(begin + share, num_pairs)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for at in range(begin, end, RUN):
        ids = _experts(ids_ptr, at + tl.arange(0, RUN), end, num_experts)
        counts += tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + program * EXPERTS + experts, counts)


@triton.jit(do_not_specialize=["num_pairs", "share", "num_programs"])
def place_kernel(
    ids_ptr, counts_ptr, order_ptr, blocks_ptr, num_pairs, share, num_programs, num_experts,
    RUN: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """order [pairs]: the pairs by expert. The program behind the last run writes `blocks`: how many blocks of up to
    BLOCK_M rows of one expert there are, then BLOCK_FIELDS of each."""
    program, experts, run = tl.program_id(0), tl.arange(0, EXPERTS), tl.arange(0, RUN)
    totals = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_programs, 16):
        others = first + tl.arange(0, 16)
        pointers = counts_ptr + others[:, None] * EXPERTS + experts[None, :]
        counts = tl.load(pointers, mask=(others < num_programs)[:, None], other=0)
        totals += tl.sum(counts, 0)
        before += tl.sum(tl.where((others < program)[:, None], counts, 0), 0)
    totals = tl.where(experts < num_experts, totals, 0)
    starts = tl.cumsum(totals, 0) - totals
    if program == num_programs:
        num_blocks = tl.cdiv(totals, BLOCK_M)
        upto = tl.cumsum(num_blocks, 0)
        tl.store(blocks_ptr, tl.max(upto))
        pointers = blocks_ptr + 1 + (upto - num_blocks) * BLOCK_FIELDS
        for block in range(0, tl.max(num_blocks)):
            mine, row = block < num_blocks, block * BLOCK_M
            tl.store(pointers + block * BLOCK_FIELDS, experts, mask=mine)
            tl.store(pointers + block * BLOCK_FIELDS + 1, starts + row, mask=mine)
            tl.store(pointers + block * BLOCK_FIELDS + 2, totals - row, mask=mine)
    else:
        begin = program * share
        end = tl.minimum(begin + share, num_pairs)
        following = starts + before
        for at in range(begin, end, RUN):
            ids = _experts(ids_ptr, at + run, end, num_experts)
            # The same ids along the other axis: read again, not moved between threads.
            others = _experts(ids_ptr, at + tl.arange(0, RUN), end, num_experts)
            rank = tl.sum(((ids[:, None] == others[None, :]) & (run[:, None] > run[None, :])).to(tl.int32), 1)
            belongs = ids[:, None] == experts[None, :]
            place = tl.sum(tl.where(belongs, following[None, :], 0), 1) + rank
            tl.store(order_ptr + place, at + run, mask=ids < num_experts)
            following += tl.sum(belongs.to(tl.int32), 0)
