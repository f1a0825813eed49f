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


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Where results need no rounding."""
    return linear(x, weight, bias).reshape(-1, weight.shape[0]).max(-1, keepdim=True)[1]


def linear_group(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(linear(x, weight, None) for weight in weights)


def linear_silu_mul(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    return silu_mul(linear(x, gate_weight, None), linear(x, up_weight, None))


def linear_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return add_rms_norm(linear(x, weight, None), residual, norm_weight, eps)


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


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = torch.sort(logits.double(), dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def logit_signals(logits: Tensor, end: int, entropy: bool) -> Tensor:
    wide = logits.double()
    shares = wide.softmax(-1)
    nats = -(shares * torch.where(shares > 0, shares, 1.0).log()).sum(-1)
    return torch.stack((wide.amax(-1) - wide[:, end], nats if entropy else torch.zeros_like(nats)), 1)


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


def kv_append(
    k_pool: Tensor, v_pool: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, k: Tensor, v: Tensor, slots: Tensor
) -> tuple[Tensor, ...]:
    """What the four hold afterwards (those that are there), token by token and head by head."""
    page_size = k_pool.shape[2]
    found = []
    for pool, scale, x in ((k_pool, k_scale, k), (v_pool, v_scale, v)):
        pool, scale = pool.clone(), None if scale is None else scale.clone()
        for token, slot in enumerate(slots.tolist()):
            for g in range(k.shape[1] if slot >= 0 else 0):
                row, at = x[token // k.shape[2], g, token % k.shape[2]], (slot // page_size, g, slot % page_size)
                if scale is None:
                    pool[at] = row.to(pool.dtype)
                    continue
                largest = row.float().abs().max()
                pool[at] = (row.float() * (127 / largest)).round().to(torch.int8) if largest > 0 else 0
                scale[at] = largest / 127
        found += [pool, scale]
    return tuple(t for t in (found[0], found[2], found[1], found[3]) if t is not None)


def kv_gather(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    packed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Page by page; an entry below zero is read as page 0."""

    def one(pool: Tensor, scale: Tensor | None) -> Tensor:
        values = pool.double() if scale is None else pool.double() * scale.double()[..., None]
        rows = [torch.cat([values[max(page, 0)] for page in line], dim=1) for line in block_table.tolist()]
        return torch.cat(rows, dim=1)[None] if packed else torch.stack(rows)

    return one(k_pool, k_scale), one(v_pool, v_scale)


def paged_mask(q_starts: Tensor, q_positions: Tensor, num_keys: int, window: int) -> Tensor:
    """Token by token."""
    starts = q_starts.tolist()
    seen = torch.zeros(1, 1, len(q_positions), (len(starts) - 1) * num_keys, dtype=torch.bool)
    for row, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        for token in range(begin, end):
            last = int(q_positions[token])
            first = max(last - window + 1, 0) if window else 0
            seen[0, 0, token, row * num_keys + first : row * num_keys + min(last + 1, num_keys)] = True
    return seen


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """Row by row, over its keys alone."""
    k, v = kv_gather(k_pool, v_pool, k_scale, v_scale, block_table, False, torch.float64)
    starts = [0, q.shape[2]] if q_starts is None else q_starts.tolist()
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(len(k)):
        b, begin, end = (row, 0, q.shape[2]) if q_starts is None else (0, starts[row], starts[row + 1])
        own = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])[b : b + 1]
        for i in range(begin, end):  # of one query: its window is a matter of which keys there are
            last = k.shape[2] if q_positions is None else min(int(q_positions[i]) + 1, k.shape[2])
            first = max(int(q_positions[i]) + 1 - window, 0) if window and q_positions is not None else 0
            if first < last:
                keys, values = k[row : row + 1, :, first:last], v[row : row + 1, :, first:last]
                bias = None if own is None else own[:, :, i : i + 1, first:last]
                out[b : b + 1, :, i : i + 1] = attention(
                    q[b : b + 1, :, i : i + 1], keys, values, bias, None, False, scale
                )
    return out


FORMULAS: dict[str, Any] = {
    f.__name__: f
    for f in (
        rms_norm,
        add_rms_norm,
        silu_mul,
        linear,
        linear_argmax,
        linear_group,
        linear_silu_mul,
        linear_add_rms_norm,
        qk_norm_rope,
        attention,
        kv_append,
        kv_gather,
        paged_mask,
        paged_attention,
        moe_route,
        moe_experts,
        top_tokens,
        logit_signals,
    )
}
