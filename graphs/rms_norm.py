"""weight * cast(h * rsqrt(mean(h^2) + eps)), h = float(x)  ->  qwenopt::rms_norm"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context
from qwenopt.graphs.pattern import Cast, Const, Match, Number, Op, When, add, any_, is_dtype_cast, mul, square, unary
from qwenopt.ops import RMS_NORM


def _float32(value: Any, m: Match) -> str | None:
    h = spelling.fake(m["h"])
    return None if h.dtype == torch.float32 else f"the norm is computed in {h.dtype}, not float32"


_MEAN = Op("mean", {"x": square(any_("h")), "dim": Const(-1), "keepdim": Const(True)})
_NORMED = mul(any_("h"), unary("rsqrt", add(_MEAN, Number("eps"))))
PATTERN = When(mul(any_("weight"), Cast(_NORMED)), _float32)


def norm_input(m: Match) -> Node:
    """The node that is normalised: `h`, or what it is cast from when nobody else wants the float32 copy."""
    h: Node = m["h"]
    call = spelling.read(h)
    if call is None or call.name != "cast" or not is_dtype_cast(h):
        return h
    if any(user not in m.interior for user in h.users):
        return h
    m.consume(h)
    return call.args["x"]  # type: ignore[no-any-return]


def raise_rms_norm(ctx: Context) -> None:
    """Raise every root mean square norm."""
    for m in ctx.find(RMS_NORM, "mul", PATTERN):
        ctx.replace(RMS_NORM, [m.root], m.interior, (norm_input(m), m["weight"], m["eps"]))
