"""length.add_(n) of each layer's cache  ->  one torch._foreach_add_ behind the last of them"""

from __future__ import annotations

import torch
from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.merging import Merging, is_advance


def merge_advances(merging: Merging) -> None:
    """Count on all layers of a static cache in one launch. On a CPU a plan does it: nothing is launched there."""
    by_count: dict[int, list[Node]] = {}
    for node in merging.gm.graph.nodes:
        if is_advance(node) and spelling.fake(node.args[0]).device.type == "cuda":
            by_count.setdefault(node.args[1], []).append(node)
    for count, nodes in by_count.items():
        last = nodes[-1]
        moved = [node for node in nodes[:-1] if merging.move_behind(node, last)]
        if not moved:
            continue
        nodes = [*moved, last]
        with merging.gm.graph.inserting_after(last):
            merging.gm.graph.call_function(torch._foreach_add_, ([node.args[0] for node in nodes], count))
        for node in nodes:
            merging.gm.graph.erase_node(node)
