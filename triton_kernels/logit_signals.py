"""logit_signals in Triton: programs sum over 4096 logits each, another for each row puts their sums together."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def num_parts(vocab: int) -> int:
    """Parts of a row of so many logits."""
    return -(-vocab // BLOCK)


@triton.jit
def _largest(x):
    """The largest of `x`; NaN where there is one."""
    largest = tl.max(x, 0)
    return tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), largest)


@triton.jit(do_not_specialize=["vocab"])
def logit_parts_kernel(logits_ptr, parts_ptr, stride, vocab, ENTROPY: tl.constexpr, COLS: tl.constexpr):
    """A part's largest logit m, and the sums of e^d and of e^d d with d = x - m."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * COLS + tl.arange(0, COLS)
    x = tl.load(logits_ptr + row * stride + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
    largest = _largest(x)
    out = parts_ptr + (row * tl.num_programs(1) + part) * 3
    tl.store(out, largest)
    if ENTROPY:
        d = x - tl.where(largest == -float("inf"), 0.0, largest)
        e = tl.exp(d)
        tl.store(out + 1, tl.sum(e, 0))
        tl.store(out + 2, tl.sum(tl.where(e == 0, 0.0, e * d), 0))  # a logit of -inf has no share


@triton.jit(do_not_specialize=["num_parts"])
def logit_signals_kernel(
    logits_ptr, parts_ptr, out_ptr, stride, end, num_parts, ENTROPY: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    there = part < num_parts
    parts = parts_ptr + (row * num_parts + part) * 3
    m = tl.load(parts, mask=there, other=-float("inf"))
    largest = _largest(m)
    tl.store(out_ptr + row * 2, largest - tl.load(logits_ptr + row * stride + end).to(tl.float32))
    entropy = 0.0
    if ENTROPY:
        s, t = tl.load(parts + 1, mask=there, other=0.0), tl.load(parts + 2, mask=there, other=0.0)
        d = m - largest
        weight = tl.exp(d)
        empty = (s == 0) | (weight == 0)
        total = tl.sum(tl.where(empty, 0.0, weight * s), 0)
        moment = tl.sum(tl.where(empty, 0.0, weight * (t + d * s)), 0)
        entropy = tl.log(total) - moment / total
    tl.store(out_ptr + row * 2 + 1, entropy)


def launch(logits: Tensor, parts: Tensor, out: Tensor, end: int, entropy: bool) -> None:
    """Signals of each row of logits [R, V], whose rows are contiguous, into out float32 [R, 2].

    parts float32 [R, parts, 3] is for what the parts find.
    """
    num_rows, vocab = logits.shape
    count = num_parts(vocab)
    logit_parts_kernel[(num_rows, count)](
        logits, parts, logits.stride(0), vocab, ENTROPY=entropy, COLS=BLOCK, num_warps=8
    )
    logit_signals_kernel[(num_rows,)](
        logits, parts, out, logits.stride(0), end, count,
        ENTROPY=entropy, PARTS=triton.next_power_of_2(count), num_warps=1,
    )  # fmt: skip
