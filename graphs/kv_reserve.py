"""qwenopt::kv_reserve inside the first layer  ->  the same before all layers, so that a plan is not cut in two"""

from __future__ import annotations

from torch.fx import Node

from qwenopt.graphs.context import Context
from qwenopt.graphs.storage import storage_ids
from qwenopt.ops import KV_RESERVE


def hoist_kv_reserve(ctx: Context) -> None:
    """Move each call up to behind the last node that it needs, or that looks at what it writes."""
    for node in list(ctx.graph.nodes):
        if node.op == "call_function" and node.target is KV_RESERVE.default:
            _hoist(node)


def _hoist(node: Node) -> None:
    touched = frozenset().union(*(storage_ids(a) for a in node.all_input_nodes))
    above = node.prev
    while above.op.startswith("call") and above not in node.all_input_nodes and not _looks_at(above, touched):
        above = above.prev
    if above is not node.prev:
        above.append(node)


def _looks_at(node: Node, storages: frozenset[int]) -> bool:
    return any(storage_ids(n) & storages for n in (node, *node.all_input_nodes))
