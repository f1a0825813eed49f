"""Choosing the largest of some numbers, in an order that is the same everywhere: of equals the first, NaN above all."""

from __future__ import annotations

import triton
import triton.language as tl

TAKEN = tl.constexpr(-(1 << 63))


@triton.jit
def keys_of(x, index):
    """Whole numbers, no two equal, in the order of `x`: NaN above all, as for torch.topk; of equals the first."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 and 0 are equal
    bits = tl.where(x == x, bits, 0x7FC00000)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (order.to(tl.int64) << 32) + (0x7FFFFFFF - index)


@triton.jit
def index_of(key):
    """The index that a key was made with."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def largest(keys, K: tl.constexpr, SLOTS: tl.constexpr):
    """The `K` largest keys in descending order, in SLOTS >= K places of which the others are TAKEN."""
    slot = tl.arange(0, SLOTS)
    chosen = tl.full((SLOTS,), TAKEN, tl.int64)
    for i in range(K):
        key = tl.max(keys, 0)
        chosen = tl.where(slot == i, key, chosen)
        keys = tl.where(keys == key, TAKEN, keys)
    return chosen
