"""matrix product over one element  ->  elementwise product

Up to 5.18, transformers multiplies the rotary frequencies with the positions in this way. Left as it is, it would be a
heavy operation that no kernel stands for, and the whole graph would go to Inductor for its sake.
"""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context, differs_in_meta, fake_mode


def multiply_outer_products(ctx: Context) -> None:
    """Write `x @ y` as `x * y` where x has one column and y one row: then both broadcast to the same products."""
    for node in list(ctx.graph.nodes):
        call = spelling.read(node)
        if call is None or call.name not in ("matmul", "bmm") or set(call.args) != {"x", "other"}:
            continue
        x, y = (spelling.fake(a) for a in call.args.values())
        if not _is_outer(x, y):
            continue
        with ctx.graph.inserting_before(node):
            product = ctx.graph.call_function(torch.mul, tuple(call.args.values()))
        with torch.no_grad(), fake_mode((x, y)):
            product.meta = {**node.meta, "example_value": torch.mul(x, y)}
        if differs_in_meta([node], [product]) is not None:
            ctx.graph.erase_node(product)
            continue
        ctx.writes.place(product, node)
        node.replace_all_uses_with(product)
        ctx.graph.erase_node(node)


def _is_outer(x: object, y: object) -> bool:
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or min(x.ndim, y.ndim) < 2:
        return False
    return statically_known_true(x.shape[-1] == 1) and statically_known_true(y.shape[-2] == 1)
