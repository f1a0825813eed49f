"""moe_experts for a few tokens: one program for each token or pair and some outputs, nothing sorted, no tile padded.

A pair is a token and one of its experts. Programs of different tokens and the same outputs stand side by side in the
grid: where two tokens have one expert, its weights come from the device's memory once and from L2 the second time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) * up of float32, rounded to `dtype` where the reference has tensors of it."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (gate * up).to(dtype)


@triton.jit
def weighted(rows, weights, dtype: tl.constexpr):
    """rows * weights of float32, rounded to `dtype` where the reference has tensors of it."""
    return (rows.to(dtype).to(tl.float32) * weights.to(tl.float32)).to(dtype)


@triton.jit
def decode_gate_up_kernel(
    x_ptr, ids_ptr, weight_ptr, hidden_ptr, num_inner, num_cols, num_experts, x_stride, expert_stride, row_stride,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of the I = `num_cols` values of pair `program_id(0)` in its expert, to `hidden` [pairs, I]."""
    pair, first = tl.program_id(0), tl.program_id(1) * BLOCK_N
    expert = tl.load(ids_ptr + pair)
    if (expert < 0) | (expert >= num_experts):
        return
    n, k = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    keep = n < num_cols
    x_ptr += (pair // TOP_K).to(tl.int64) * x_stride
    weight_ptr += expert * expert_stride
    gates = weight_ptr + n[:, None].to(tl.int64) * row_stride + k[None, :]
    ups = weight_ptr + (n + num_cols)[:, None].to(tl.int64) * row_stride + k[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, num_inner, BLOCK_K):
        inside = k < (BLOCK_K if EVEN else num_inner - start)
        mask = keep[:, None] & inside[None, :]
        x = tl.load(x_ptr + start + k, mask=inside, other=0).to(tl.float32)[None, :]
        gate += tl.load(gates + start, mask=mask, other=0).to(tl.float32) * x
        up += tl.load(ups + start, mask=mask, other=0).to(tl.float32) * x
    out = gated(tl.sum(gate, 1), tl.sum(up, 1), hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + pair.to(tl.int64) * num_cols + n, out, mask=keep)


@triton.jit
def decode_down_kernel(
    hidden_ptr, ids_ptr, scores_ptr, weight_ptr, out_ptr, num_inner, num_cols, num_experts, expert_stride, row_stride,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of token `program_id(0)`: its experts' rows of the weight are read side by side, then summed."""
    token, first = tl.program_id(0), tl.program_id(1) * BLOCK_N
    row, k = tl.arange(0, SLOTS * BLOCK_N), tl.arange(0, BLOCK_K)
    slot, n = row // BLOCK_N, first + row % BLOCK_N
    pair = token.to(tl.int64) * TOP_K + slot
    expert = tl.load(ids_ptr + pair, mask=slot < TOP_K, other=num_experts)
    tl.device_assert((expert >= 0) & (expert <= num_experts), "moe_experts: an expert id is not in 0..num_experts")
    mine = (expert >= 0) & (expert < num_experts)
    keep = mine & (n < num_cols)
    weights = weight_ptr + (expert * expert_stride + n.to(tl.int64) * row_stride)[:, None] + k[None, :]
    xs = hidden_ptr + (pair * num_inner)[:, None] + k[None, :]
    acc = tl.zeros((SLOTS * BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, num_inner, BLOCK_K):
        inside = k < (BLOCK_K if EVEN else num_inner - start)
        mask = keep[:, None] & inside[None, :]
        x = tl.load(xs + start, mask=mask, other=0).to(tl.float32)
        acc += tl.load(weights + start, mask=mask, other=0).to(tl.float32) * x
    score = tl.load(scores_ptr + pair, mask=mine, other=0)
    rows = weighted(tl.sum(acc, 1), score, hidden_ptr.dtype.element_ty).to(tl.float32)
    out = tl.sum(tl.reshape(rows, (SLOTS, BLOCK_N)), 0)
    n = first + tl.arange(0, BLOCK_N)
    at = out_ptr + token.to(tl.int64) * num_cols + n
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=n < num_cols)
