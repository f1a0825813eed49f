"""raised graph  ->  its own code, on kernels, without Inductor

Every raised op is bound to its kernel function, so a step pays no dispatcher, no guards of its own and no compile
beyond Dynamo's trace. On the CPU runs of them become plans, one native call each (plan.py); on a GPU the whole is
captured where `mode="reduce-overhead"` asks for it (cuda_graph.py). Everything that was not raised runs as it stood, in
its place, so mutation keeps its order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qwenopt.graphs import Raised
from qwenopt.lowering import plan
from qwenopt.report import GraphReport

# Parts of names of operations whose time is not a rounding error: any of them left unraised sends the graph to
# Inductor under lowering="auto".
_HEAVY = ("linear", "matmul", "mm", "conv", "scaled_dot_product", "einsum", "attention", "lstm", "gru")


def heavy_leftovers(gm: GraphModule, raised: Iterable[Raised]) -> list[str]:
    """Names of heavy nodes that are not raised."""
    mine = {r.node for r in raised}
    return [n.name for n in gm.graph.nodes if n not in mine and _is_heavy(n)]


def _is_heavy(node: Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    name = str(getattr(node.target, "__name__", node.target)).lower()
    if name in ("rmatmul", "imatmul", "__matmul__"):
        return True
    return any(part in name for part in _HEAVY) and name not in ("is_nonzero", "_convert_element_type", "convert")


def lower(
    gm: GraphModule, raised: Sequence[Raised], report: GraphReport, device: torch.device | None = None
) -> Callable[..., Any]:
    """Bind every raised op to its provider, or to its reference where none fits, and plan what can be planned.

    `device` is the one that the graph runs on (default: the CPU). Notes the plans in `report`.
    """
    for r in raised:
        r.node.target = r.op.reference if r.provider is None else r.provider.fn
    if device is None or device.type == "cpu":
        installed = plan.install(gm, raised)
        report.plan_steps, report.plan_breaks = installed.steps, installed.breaks
    gm.graph.lint()
    gm.recompile()
    return gm.forward
