"""a call of one of our ops that the model makes itself  ->  the same call, known as raised"""

from __future__ import annotations

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context, Raised
from qwenopt.ops import Op
from qwenopt.report import Site


def adopt(ctx: Context, op: Op) -> None:
    """Count every call of `op` that stands in the graph as raised, so that it gets a kernel like the others."""
    for node in ctx.graph.nodes:
        if node.op == "call_function" and node.target is op.default:
            ctx.raised.append(Raised(op, node, Site(op.name, spelling.module_path(node), "")))
