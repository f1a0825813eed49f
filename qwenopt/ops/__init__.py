"""The operations that Qwen3 graphs are raised to; importing this package registers them as `torch.ops.qwenopt.*`."""

from __future__ import annotations

from qwenopt.ops.add_rms_norm import ADD_RMS_NORM
from qwenopt.ops.attention import ATTENTION
from qwenopt.ops.budget_guard import BUDGET_GUARD
from qwenopt.ops.budget_step import BUDGET_STEP
from qwenopt.ops.kv_append import KV_APPEND
from qwenopt.ops.kv_gather import KV_GATHER, PAGED_MASK
from qwenopt.ops.kv_reserve import KV_RESERVE
from qwenopt.ops.linear import LINEAR
from qwenopt.ops.linear_add_rms_norm import LINEAR_ADD_RMS_NORM
from qwenopt.ops.linear_argmax import LINEAR_ARGMAX
from qwenopt.ops.linear_group import LINEAR_GROUP
from qwenopt.ops.linear_silu_mul import LINEAR_SILU_MUL
from qwenopt.ops.logit_signals import LOGIT_SIGNALS
from qwenopt.ops.moe_experts import MOE_EXPERTS
from qwenopt.ops.moe_route import MOE_ROUTE
from qwenopt.ops.op import Choice, Op, Provider
from qwenopt.ops.paged_attention import PAGED_ATTENTION
from qwenopt.ops.qk_norm_rope import QK_NORM_ROPE
from qwenopt.ops.qk_norm_rope_append import QK_NORM_ROPE_APPEND
from qwenopt.ops.qk_norm_rope_static_append import QK_NORM_ROPE_STATIC_APPEND
from qwenopt.ops.rms_norm import RMS_NORM
from qwenopt.ops.silu_mul import SILU_MUL
from qwenopt.ops.top_tokens import TOP_TOKENS

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        RMS_NORM,
        ADD_RMS_NORM,
        QK_NORM_ROPE,
        ATTENTION,
        KV_APPEND,
        KV_RESERVE,
        KV_GATHER,
        PAGED_MASK,
        PAGED_ATTENTION,
        SILU_MUL,
        MOE_ROUTE,
        MOE_EXPERTS,
        LINEAR,
        LOGIT_SIGNALS,
        BUDGET_GUARD,
        TOP_TOKENS,
        BUDGET_STEP,
        LINEAR_SILU_MUL,
        LINEAR_GROUP,
        LINEAR_ADD_RMS_NORM,
        LINEAR_ARGMAX,
        QK_NORM_ROPE_APPEND,
        QK_NORM_ROPE_STATIC_APPEND,
    )
}

__all__ = [
    "ADD_RMS_NORM",
    "ATTENTION",
    "BUDGET_GUARD",
    "BUDGET_STEP",
    "KV_APPEND",
    "KV_GATHER",
    "KV_RESERVE",
    "LINEAR",
    "LINEAR_ADD_RMS_NORM",
    "LINEAR_ARGMAX",
    "LINEAR_GROUP",
    "LINEAR_SILU_MUL",
    "LOGIT_SIGNALS",
    "MOE_EXPERTS",
    "MOE_ROUTE",
    "OPS",
    "PAGED_ATTENTION",
    "PAGED_MASK",
    "QK_NORM_ROPE",
    "QK_NORM_ROPE_APPEND",
    "QK_NORM_ROPE_STATIC_APPEND",
    "RMS_NORM",
    "SILU_MUL",
    "TOP_TOKENS",
    "Choice",
    "Op",
    "Provider",
]
