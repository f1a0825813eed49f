"""F.linear(x, weight, bias)  ->  qwenopt::linear"""

from __future__ import annotations

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context
from qwenopt.ops import LINEAR


def raise_linear(ctx: Context) -> None:
    """Raise every linear layer."""
    for node in list(ctx.graph.nodes):
        call = spelling.read(node)
        if call is not None and call.name == "linear":
            ctx.replace(LINEAR, [node], [node], (call.args["x"], call.args["weight"], call.args.get("bias")))
