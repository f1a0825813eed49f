"""top_tokens(linear(x, weight, bias), 1), ids only  ->  qwenopt::linear_argmax"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.merging import Merging, items
from qwenopt.ops import LINEAR, LINEAR_ARGMAX, TOP_TOKENS


def merge_linear_argmax(merging: Merging) -> None:
    """Merge what ends a greedy decode step: nobody else reads the logits."""
    for top in merging.of(TOP_TOKENS):
        logits, k = top.node.args
        product, taken = merging.raised_as(LINEAR, _whole(logits)), items(top.node)
        if product is not None and k == 1 and set(taken) == {1}:
            merging.replace(LINEAR_ARGMAX, (product, top), product.node.args, {taken[1]: None}, at=top.node)


def _whole(logits: Any) -> Any:
    """Logits [1, R, N] of which `logits` [R, N] is the one item; else `logits`."""
    if isinstance(logits, Node) and logits.target is operator.getitem and logits.args[1] == 0:
        whole = spelling.fake(logits.args[0])
        if whole.dim() == 3 and whole.shape[0] == 1:
            return logits.args[0]
    return logits
