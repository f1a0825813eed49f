"""moe_route in Triton: a warp takes a token, and finds one expert after another among its logits in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TAKEN = tl.constexpr(-(1 << 63))


@triton.jit
def _keys(x, index):
    """Whole numbers, no two equal, in the order of `x`: NaN above all, as for torch.topk; of equals the first."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 and 0 are equal
    bits = tl.where(x == x, bits, 0x7FC00000)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (order.to(tl.int64) << 32) + (0x7FFFFFFF - index)


@triton.jit
def moe_route_kernel(
    logits_ptr, weights_ptr, indices_ptr, stride, num_experts,
    TOP_K: tl.constexpr, NORM: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    there = expert < num_experts
    x = tl.load(logits_ptr + token * stride + expert, mask=there, other=-float("inf")).to(tl.float32)
    largest = tl.max(x, 0)
    total = tl.sum(tl.where(there, tl.exp(x - largest), 0.0), 0)
    keys = tl.where(there, _keys(x, expert), TAKEN)
    chosen = tl.full((SLOTS,), TAKEN, tl.int64)
    for i in range(TOP_K):
        key = tl.max(keys, 0)
        chosen = tl.where(slot == i, key, chosen)
        keys = tl.where(keys == key, TAKEN, keys)
    order = (chosen >> 32).to(tl.int32)
    logit = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
    weight = tl.where(slot < TOP_K, tl.div_rn(tl.exp(logit - largest), total), 0.0)
    if NORM:
        weight = tl.div_rn(weight, tl.sum(weight, 0))
    at = token * TOP_K + slot
    tl.store(weights_ptr + at, weight.to(weights_ptr.dtype.element_ty), mask=slot < TOP_K)
    tl.store(indices_ptr + at, 0x7FFFFFFF - (chosen & 0xFFFFFFFF), mask=slot < TOP_K)


def launch(logits: Tensor, weights: Tensor, indices: Tensor, norm_topk_prob: bool) -> None:
    """Route each row of logits [T, E], whose rows are contiguous, into weights and indices int64 [T, K]."""
    num_tokens, num_experts = logits.shape
    top_k = weights.shape[1]
    experts = triton.next_power_of_2(num_experts)
    moe_route_kernel[(num_tokens,)](
        logits, weights, indices, logits.stride(0), num_experts,
        TOP_K=top_k, NORM=norm_topk_prob, EXPERTS=experts, SLOTS=triton.next_power_of_2(top_k),
        num_warps=max(1, experts // 256),
    )  # fmt: skip
