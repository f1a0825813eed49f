"""silu_mul(linear(x, gate_weight), linear(x, up_weight))  ->  qwenopt::linear_silu_mul"""

from __future__ import annotations

from qwenopt.graphs.merging import Merging
from qwenopt.ops import LINEAR, LINEAR_SILU_MUL, SILU_MUL


def merge_linear_silu_mul(merging: Merging) -> None:
    """Merge the first half of every dense MLP."""
    for product in merging.of(SILU_MUL):
        gate, up = (merging.raised_as(LINEAR, node) for node in product.node.args)
        if gate is None or up is None or gate is up:
            continue
        (x, gate_weight, gate_bias), (other, up_weight, up_bias) = gate.node.args, up.node.args
        if x is other and gate_bias is up_bias is None:
            args = (x, gate_weight, up_weight)
            merging.replace(LINEAR_SILU_MUL, (gate, up, product), args, {product.node: None}, at=product.node)
