"""qk_norm_rope_static_append: rotated keys, and values, straight into a static cache. What qk_norm_rope and the two
index_copy_ behind it are merged to on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops import triton
from qwenopt.ops.op import Op
from qwenopt.ops.qk_norm_rope import check_heads, qk_norm_rope
from qwenopt.ops.triton import qk_norm_rope_static_append as by_triton


def _check(
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
) -> None:
    check_heads(q, k, q_weight, k_weight, cos, sin, eps)
    batch, seq, groups, dim = k.shape
    torch._check(
        keys.dim() == 4
        and keys.shape == values.shape
        and (*keys.shape[:2], keys.shape[3]) == (batch, groups, dim)
        and keys.dtype == values.dtype == k.dtype == v.dtype,
        lambda: (
            f"qk_norm_rope_static_append: keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} "
            f"{values.dtype}; need ({batch}, {groups}, L, {dim}) {k.dtype} twice"
        ),
    )
    torch._check(
        v.shape == (batch, groups, seq, dim),
        lambda: f"qk_norm_rope_static_append: v {tuple(v.shape)}; need {(batch, groups, seq, dim)}",
    )
    torch._check(
        length.dim() == 0 and length.dtype == torch.int64,
        lambda: f"qk_norm_rope_static_append: length {tuple(length.shape)} {length.dtype}; need one torch.int64",
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
    """Norm and rotate queries and keys; keys, and `v` [B, G, S, D], become those at `length` on of the cache.

    q, k, weights, cos, sin and eps as in qk_norm_rope, whose queries are returned; keys and values [B, G, L, D] are
    written to; length int64 [], the tokens that are there. Places from L on are an error, on a GPU a device assert.
    """
    _check(q, k, q_weight, k_weight, cos, sin, eps, keys, values, v, length)
    q_out, k_out = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    positions = torch.arange(q.shape[1], device=q.device) + length
    keys.index_copy_(2, positions, k_out)
    values.index_copy_(2, positions, v)
    return q_out


QK_NORM_ROPE_STATIC_APPEND = Op(qk_norm_rope_static_append, check=_check, mutates=("keys", "values"))


QK_NORM_ROPE_STATIC_APPEND.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(
    by_triton.qk_norm_rope_static_append
)
