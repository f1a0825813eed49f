"""add_rms_norm(linear(x, weight), residual, norm_weight, eps)  ->  qwenopt::linear_add_rms_norm"""

from __future__ import annotations

from qwenopt.graphs.merging import Merging, items
from qwenopt.ops import ADD_RMS_NORM, LINEAR, LINEAR_ADD_RMS_NORM


def merge_linear_add_rms_norm(merging: Merging) -> None:
    """Merge the last projection of attentions and dense MLPs with the residual sum and the norm behind it."""
    for norm in merging.of(ADD_RMS_NORM):
        product, *rest = norm.node.args
        linear = merging.raised_as(LINEAR, product)
        if linear is not None and linear.node.args[2] is None:
            results = {node: index for index, node in items(norm.node).items()}
            args = (*linear.node.args[:2], *rest)
            merging.replace(LINEAR_ADD_RMS_NORM, (linear, norm), args, results, at=norm.node)
