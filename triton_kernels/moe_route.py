"""moe_route in Triton: a warp takes a token, and finds one expert after another among its logits in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.ordered import TAKEN, index_of, keys_of, largest


@triton.jit
def moe_route_kernel(
    logits_ptr, weights_ptr, indices_ptr, stride, num_experts,
    TOP_K: tl.constexpr, NORM: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert, slot = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    there = expert < num_experts
    x = tl.load(logits_ptr + token * stride + expert, mask=there, other=-float("inf")).to(tl.float32)
    highest = tl.max(x, 0)
    total = tl.sum(tl.where(there, tl.exp(x - highest), 0.0), 0)
    chosen = largest(tl.where(there, keys_of(x, expert), TAKEN), TOP_K, SLOTS)
    order = (chosen >> 32).to(tl.int32)
    logit = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)
    weight = tl.where(slot < TOP_K, tl.div_rn(tl.exp(logit - highest), total), 0.0)
    if NORM:
        weight = tl.div_rn(weight, tl.sum(weight, 0))
    at = token * TOP_K + slot
    tl.store(weights_ptr + at, weight.to(weights_ptr.dtype.element_ty), mask=slot < TOP_K)
    tl.store(indices_ptr + at, index_of(chosen), mask=slot < TOP_K)


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
