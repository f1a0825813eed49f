"""rms_norm(residual + x)  ->  qwenopt::add_rms_norm, which gives the sum as well"""

from __future__ import annotations

from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context
from qwenopt.ops import ADD_RMS_NORM, RMS_NORM


def raise_add_rms_norm(ctx: Context) -> None:
    """Take the sum in front of a raised rms_norm into the op. The norm's own site becomes an add_rms_norm site."""
    for norm in [r for r in ctx.raised if r.op is RMS_NORM]:
        total, weight, eps = norm.node.args
        call = spelling.read(total)
        if not isinstance(total, Node) or call is None or call.name != "add" or set(call.args) != {"x", "other"}:
            continue
        residual, x = call.args["x"], call.args["other"]
        fakes = [spelling.fake(v) for v in (residual, x)]
        if any(not hasattr(f, "shape") for f in fakes) or fakes[0].shape != fakes[1].shape:
            continue
        done = ctx.replace(ADD_RMS_NORM, [norm.node, total], [norm.node, total], (x, residual, weight, eps))
        if done is not None:
            ctx.raised.remove(norm)
