"""silu(gate) * up  ->  qwenopt::silu_mul"""

from __future__ import annotations

from qwenopt.graphs.context import Context
from qwenopt.graphs.pattern import any_, mul, unary
from qwenopt.ops import SILU_MUL

PATTERN = mul(unary("silu", any_("gate"), inplace=(False,)), any_("up"))


def raise_silu_mul(ctx: Context) -> None:
    """Raise the gate of every dense SwiGLU MLP."""
    for m in ctx.find(SILU_MUL, "mul", PATTERN):
        ctx.replace(SILU_MUL, [m.root], m.interior, (m["gate"], m["up"]))
