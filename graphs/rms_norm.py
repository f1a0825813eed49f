"""weight * cast(h * rsqrt(mean(h^2) + eps)), h = float(x)  ->  qwenopt::rms_norm"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context
from qwenopt.graphs.pattern import (
    Bind,
    Const,
    Either,
    Match,
    Number,
    Op,
    When,
    add,
    any_,
    is_dtype_cast,
    mul,
    square,
    unary,
)
from qwenopt.ops import RMS_NORM

OTHER_DTYPE = "the normed values are not cast back to the dtype of the input before they are scaled"


def _float32(value: Any, m: Match) -> str | None:
    h = spelling.fake(m["h"])
    return None if h.dtype == torch.float32 else f"the norm is computed in {h.dtype}, not float32"


_MEAN = Op("mean", {"x": square(any_("h")), "dim": Const(-1), "keepdim": Const(True)})
_NORMED = mul(any_("h"), unary("rsqrt", add(_MEAN, Number("eps"))))
_CAST = Op("cast", {"x": _NORMED, "how": any_("how")})
_OPERAND = Bind("operand", Either((_CAST, _NORMED)))
PATTERN = When(mul(any_("weight"), _OPERAND), _float32)


def norm_input(m: Match) -> Node | None:
    """The node that is normalised, in the dtype in which the result is scaled; None when there is no such node.

    It is `h`, or what `h` is cast from when nobody else wants the float32 copy.
    """
    x: Node = m["h"]
    call = spelling.read(x)
    if call is not None and call.name == "cast" and is_dtype_cast(x) and all(u in m.interior for u in x.users):
        m.consume(x)
        x = call.args["x"]
    return x if spelling.fake(x).dtype == spelling.fake(m["operand"]).dtype else None


def raise_rms_norm(ctx: Context) -> None:
    """Raise every root mean square norm."""
    for m in ctx.find(RMS_NORM, "mul", PATTERN):
        x = norm_input(m)
        if x is None:
            ctx.miss(RMS_NORM, m.root, OTHER_DTYPE)
        else:
            ctx.replace(RMS_NORM, [m.root], m.interior, (x, m["weight"], m["eps"]))
