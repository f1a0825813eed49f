"""moe_experts: the expert MLPs of a mixture-of-experts layer, routed tokens in, weighted sum out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import cpu, triton
from qwenopt.ops.op import Op
from qwenopt.ops.silu_mul import silu_mul
from qwenopt.ops.steps import Array, Steps, need_contiguous
from qwenopt.ops.triton import moe_experts as by_triton


def _check_shapes(x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> None:
    ok = x.dim() == 2 and indices.dim() == 2 and gate_up_proj.dim() == 3 and down_proj.dim() == 3
    ok = ok and indices.shape == weights.shape and indices.shape[0] == x.shape[0]
    ok = ok and gate_up_proj.shape[2] == x.shape[1] and down_proj.shape[1] == x.shape[1]
    ok = ok and gate_up_proj.shape[0] == down_proj.shape[0] and gate_up_proj.shape[1] == 2 * down_proj.shape[2]
    torch._check(
        ok,
        lambda: (
            f"moe_experts: x {tuple(x.shape)}, indices {tuple(indices.shape)}, weights {tuple(weights.shape)}, "
            f"gate_up_proj {tuple(gate_up_proj.shape)}, down_proj {tuple(down_proj.shape)}; "
            "need (T, N), (T, K), (T, K), (E, 2I, N), (E, N, I)"
        ),
    )


def moe_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Sum over the K experts of each token of `weight * down(silu(gate(x)) * up(x))`.

    x [T, N]; indices [T, K] int64 in 0..E (E itself means "not mine" and adds nothing, as in expert parallelism);
    weights [T, K]; gate_up_proj [E, 2I, N]; down_proj [E, N, I]. Returns [T, N] in `x.dtype`. The weighted rows are
    summed in float32 and rounded once. Raises IndexError for any other id.
    """
    _check_shapes(x, indices, weights, gate_up_proj, down_proj)
    num_experts = gate_up_proj.shape[0]
    bad = indices[(indices < 0) | (indices > num_experts)]
    if bad.numel():
        raise IndexError(
            f"moe_experts: expert id {int(bad[0])} of {num_experts} experts; "
            f"ids must be 0..{num_experts - 1}, or {num_experts} to skip"
        )
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in indices.unique().tolist():
        if expert == num_experts:
            continue
        token, slot = torch.where(indices == expert)
        gate, up = F.linear(x[token], gate_up_proj[expert]).chunk(2, dim=-1)
        rows = F.linear(silu_mul(gate, up), down_proj[expert]) * weights[token, slot, None]
        out.index_add_(0, token, rows.to(torch.float32))
    return out.to(x.dtype)


def _fake(x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    _check_shapes(x, indices, weights, gate_up_proj, down_proj)
    return x.new_empty(x.shape)


MOE_EXPERTS = Op(moe_experts, check=_check_shapes, fake=_fake, opaque=True)


def _accepts(x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> str | None:
    if indices.dtype != torch.int64:
        return f"indices {indices.dtype} (kernel: torch.int64)"
    return cpu.one_dtype(x, weights, gate_up_proj, down_proj) or cpu.contiguous(
        gate_up_proj=gate_up_proj, down_proj=down_proj
    )


def _sizes(indices: Any, down_proj: Any) -> tuple[int, ...]:
    tokens, top_k = indices.shape
    experts, hidden, inter = down_proj.shape
    return tokens, hidden, inter, experts, top_k


def _operands(tensors: Sequence[Any], out: Any, scratch: Any) -> tuple[Any, ...]:
    x, indices, _, _, down_proj = tensors
    addresses = tuple(t.data_ptr() for t in (*tensors, out, scratch))
    return (*addresses, *_sizes(indices, down_proj), x.shape[1], cpu.code(x))


def _record(steps: Steps, x: Array, indices: Array, weights: Array, gate_up_proj: Array, down_proj: Array) -> Array:
    need_contiguous(x=x, indices=indices, weights=weights)
    indices.static_shape()
    size = cpu.lib().moe_experts_scratch_bytes(*_sizes(indices, down_proj), cpu.code(x), steps.threads)
    out, scratch = steps.empty(x.shape, x.dtype), steps.scratch(size)
    tensors = (x, indices, weights, gate_up_proj, down_proj)
    steps.add("moe_experts", _operands(tensors, out, scratch), tensors, (out, scratch))
    return out


@MOE_EXPERTS.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def moe_experts_cpu(x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    lib, threads = cpu.lib(), cpu.threads()
    tensors = (cpu.as_rows(x), cpu.as_rows(indices), cpu.as_rows(weights), gate_up_proj, down_proj)
    size = lib.moe_experts_scratch_bytes(*_sizes(indices, down_proj), cpu.code(x), threads)
    out, scratch = torch.empty_like(tensors[0]), torch.empty(size, dtype=torch.uint8)
    lib.moe_experts(*_operands(tensors, out, scratch), threads)
    return out


MOE_EXPERTS.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.moe_experts)
