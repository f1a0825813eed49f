"""qk_norm_rope_static_append by the Triton kernel of qk_norm_rope_append."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import one_dtype, qk_norm_rope, unit_strides


def accepts(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    length: Tensor,
) -> str | None:
    cache = {"keys": keys, "values": values, "v": v}
    return (
        qk_norm_rope.accepts(q, k, q_weight, k_weight, cos, sin, eps)
        or one_device(q=q, **cache, length=length)
        or one_dtype(q=q, **cache)
        or unit_strides(**cache)
    )


def qk_norm_rope_static_append(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    length: Tensor,
) -> Tensor:
    from qwenopt.triton_kernels.qk_norm_rope_append import launch_static

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if v.numel():
        with torch.cuda.device_of(q):
            launch_static(q, k, q_weight, k_weight, cos, sin, eps, keys, values, v, length, out)
    return out.transpose(1, 2)
