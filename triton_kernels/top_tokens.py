"""top_tokens in Triton: programs take the largest of 4096 logits each, another for each row the largest of those."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.ordered import TAKEN, index_of, keys_of, largest

BLOCK = 4096
MAX_KEYS = 8192  # of all parts of a row


def num_parts(vocab: int) -> int:
    """Parts of a row of so many logits."""
    return -(-vocab // BLOCK)


@triton.jit(do_not_specialize=["vocab"])
def top_parts_kernel(
    logits_ptr, keys_ptr, stride, vocab, K: tl.constexpr, SLOTS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column, slot = part * COLS + tl.arange(0, COLS), tl.arange(0, SLOTS)
    there = column < vocab
    x = tl.load(logits_ptr + row * stride + column, mask=there, other=-float("inf")).to(tl.float32)
    keys = largest(tl.where(there, keys_of(x, column), TAKEN), K, SLOTS)
    tl.store(keys_ptr + (row * tl.num_programs(1) + part) * K + slot, keys, mask=slot < K)


@triton.jit(do_not_specialize=["num_keys"])
def top_tokens_kernel(
    logits_ptr, keys_ptr, values_ptr, ids_ptr, stride, num_keys,
    K: tl.constexpr, SLOTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place, slot = tl.arange(0, KEYS), tl.arange(0, SLOTS)
    keys = tl.load(keys_ptr + row * num_keys + place, mask=place < num_keys, other=TAKEN)
    ids = index_of(largest(keys, K, SLOTS))
    chosen = slot < K
    value = tl.load(logits_ptr + row * stride + ids, mask=chosen)  # the element itself: -0 and NaN as they are
    tl.store(values_ptr + row * K + slot, value, mask=chosen)
    tl.store(ids_ptr + row * K + slot, ids, mask=chosen)


def launch(logits: Tensor, keys: Tensor, values: Tensor, ids: Tensor) -> None:
    """The largest of each row of logits [R, V], whose rows are contiguous, into values and ids int64 [R, K].

    keys int64 [R, parts, K] is for what the parts find.
    """
    (num_rows, vocab), k = logits.shape, values.shape[1]
    parts, slots = num_parts(vocab), triton.next_power_of_2(k)
    top_parts_kernel[(num_rows, parts)](
        logits, keys, logits.stride(0), vocab, K=k, SLOTS=slots, COLS=BLOCK, num_warps=8
    )
    top_tokens_kernel[(num_rows,)](
        logits, keys, values, ids, logits.stride(0), parts * k,
        K=k, SLOTS=slots, KEYS=triton.next_power_of_2(parts * k), num_warps=8,
    )  # fmt: skip
