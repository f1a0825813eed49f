"""linear(x, weight) of one x, two or three of them  ->  qwenopt::linear_group"""

from __future__ import annotations

from typing import Any

from qwenopt.graphs.context import Raised
from qwenopt.graphs.merging import Merging
from qwenopt.ops import LINEAR, LINEAR_GROUP


def merge_linear_group(merging: Merging) -> None:
    """Merge the projections to queries, keys and values of every attention."""
    of_one: dict[Any, list[Raised]] = {}
    for product in merging.of(LINEAR):
        x, _, bias = product.node.args
        if bias is None:
            of_one.setdefault(x, []).append(product)
    for x, parts in of_one.items():
        if len(parts) > 1:
            weights = [part.node.args[1] for part in parts]
            results: dict[Any, int | None] = {part.node: i for i, part in enumerate(parts)}
            merging.replace(LINEAR_GROUP, parts, (x, weights), results, at=parts[0].node)
