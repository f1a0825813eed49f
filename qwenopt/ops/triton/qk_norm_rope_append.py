"""qk_norm_rope_append by the Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.triton import kv_append, qk_norm_rope


def accepts(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    v: Tensor,
    slots: Tensor,
) -> str | None:
    reason = qk_norm_rope.accepts(q, k, q_weight, k_weight, cos, sin, eps)
    return reason or kv_append.accepts(k_pool, v_pool, k_scale, v_scale, k.transpose(1, 2), v, slots)


def qk_norm_rope_append(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    v: Tensor,
    slots: Tensor,
) -> Tensor:
    from qwenopt.triton_kernels.qk_norm_rope_append import launch

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if slots.numel():
        with torch.cuda.device_of(q):
            launch(q, k, q_weight, k_weight, cos, sin, eps, k_pool, v_pool, k_scale, v_scale, v, slots, out)
    return out.transpose(1, 2)
