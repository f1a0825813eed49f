"""qk_norm_rope_append: rotated keys, and values, straight into their pages. What qk_norm_rope and the kv_append behind
it are merged to on a GPU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qwenopt.ops import triton
from qwenopt.ops.cuda import qk_norm_rope as cuda_kernels
from qwenopt.ops.cuda.providers import register
from qwenopt.ops.kv_append import check_append, kv_append
from qwenopt.ops.op import Op
from qwenopt.ops.qk_norm_rope import check_heads, qk_norm_rope
from qwenopt.ops.triton import qk_norm_rope_append as by_triton


def _check(
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
) -> None:
    check_heads(q, k, q_weight, k_weight, cos, sin, eps)
    check_append(k_pool, v_pool, k_scale, v_scale, k.transpose(1, 2), v, slots)


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
    """Norm and rotate queries and keys; keys, and `v` [B, G, S, D], go to their slots in the pools.

    q, k, weights, cos, sin and eps as in qk_norm_rope, whose queries are returned; pools, scales and slots as in
    kv_append.
    """
    q_out, k_out = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    kv_append(k_pool, v_pool, k_scale, v_scale, k_out, v, slots)
    return q_out


def _fake(*args: Any) -> Tensor:
    _check(*args)
    return qk_norm_rope(*args[:7])[0]


QK_NORM_ROPE_APPEND = Op(
    qk_norm_rope_append, check=_check, fake=_fake, opaque=True, mutates=("k_pool", "v_pool", "k_scale", "v_scale")
)


QK_NORM_ROPE_APPEND.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(
    by_triton.qk_norm_rope_append
)


# Behind Triton, which is ahead or not by a measurement on a GPU; none was made yet.
register(QK_NORM_ROPE_APPEND, cuda_kernels.accepts_append, cuda_kernels.qk_norm_rope_append)
