"""What each op computes, written a second time from its definition in float64, without any of the package's code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight.double()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.double() + residual.double()
    return rms_norm(total, weight, eps), total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.double()
    return gate / (1 + (-gate).exp()) * up.double()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.einsum("...k,nk->...n", x.double(), weight.double())
    return out if bias is None else out + bias.double()


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Each pair (d, d + D/2) is turned by its angle: (a cos - b sin, b cos + a sin)."""

    def one(x: Tensor, weight: Tensor) -> Tensor:
        x = rms_norm(x, weight, eps)
        c, s, half = cos.double()[:, :, None], sin.double()[:, :, None], x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        turned = (a * c[..., :half] - b * s[..., :half], b * c[..., half:] + a * s[..., half:])
        return torch.cat(turned, -1).permute(0, 2, 1, 3)

    return one(q, q_weight), one(k, k_weight)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_positions: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Query by query; a query that sees no key gives zeros."""
    (batch, heads, seq, _), (_, groups, length, _) = q.shape, k.shape
    allowed = torch.ones(batch, heads, seq, length, dtype=torch.bool)
    bias = torch.zeros(batch, heads, seq, length, dtype=torch.float64)
    if mask is not None and mask.dtype == torch.bool:
        allowed &= mask
    elif mask is not None:
        bias = bias + mask.double()
        allowed &= bias > -math.inf
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h * groups // heads
            for i in range(seq):
                last = length if q_positions is None else min(length, int(q_positions[i]) + 1)
                last = min(last, i + 1) if is_causal else last
                keep = allowed[b, h, i].clone()
                keep[max(last, 0) :] = False
                if keep.any():
                    scores = k[b, g, keep].double() @ q[b, h, i].double() * scale + bias[b, h, i, keep]
                    out[b, h, i] = scores.softmax(0) @ v[b, g, keep].double()
    return out


def moe_route(logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    probs = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    values, indices = torch.sort(probs, dim=-1, descending=True, stable=True)
    values, indices = values[:, :top_k], indices[:, :top_k]
    return (values / values.sum(-1, keepdim=True) if norm_topk_prob else values), indices


def moe_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Token by token, slot by slot; an id equal to the number of experts adds nothing."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    inter = down_proj.shape[2]
    for token, ids in enumerate(indices.tolist()):
        for slot, expert in enumerate(ids):
            if expert < len(down_proj):
                both = gate_up_proj[expert].double() @ x[token].double()
                row = down_proj[expert].double() @ silu_mul(both[:inter], both[inter:])
                out[token] += weights[token, slot].double() * row
    return out


FORMULAS: dict[str, Any] = {
    f.__name__: f for f in (rms_norm, add_rms_norm, silu_mul, linear, qk_norm_rope, attention, moe_route, moe_experts)
}
