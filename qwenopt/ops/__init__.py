"""The operations that Qwen3 graphs are raised to; importing this package registers them as `torch.ops.qwenopt.*`."""

from __future__ import annotations

from qwenopt.ops.add_rms_norm import ADD_RMS_NORM
from qwenopt.ops.attention import ATTENTION
from qwenopt.ops.linear import LINEAR
from qwenopt.ops.moe_experts import MOE_EXPERTS
from qwenopt.ops.moe_route import MOE_ROUTE
from qwenopt.ops.op import Choice, Op, Provider
from qwenopt.ops.qk_norm_rope import QK_NORM_ROPE
from qwenopt.ops.rms_norm import RMS_NORM
from qwenopt.ops.silu_mul import SILU_MUL

OPS: dict[str, Op] = {
    op.name: op for op in (RMS_NORM, ADD_RMS_NORM, QK_NORM_ROPE, ATTENTION, SILU_MUL, MOE_ROUTE, MOE_EXPERTS, LINEAR)
}

__all__ = [
    "ADD_RMS_NORM",
    "ATTENTION",
    "LINEAR",
    "MOE_EXPERTS",
    "MOE_ROUTE",
    "OPS",
    "QK_NORM_ROPE",
    "RMS_NORM",
    "SILU_MUL",
    "Choice",
    "Op",
    "Provider",
]
