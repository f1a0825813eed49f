"""mask built as `key_index <= query_position`  ->  the query positions, when that is proven to be all it says"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context
from qwenopt.graphs.storage import storage_ids

_FULL = slice(None, None, None)


def query_positions(ctx: Context, mask: Any, user: Node, seq: Any, length: Any) -> Node | None:
    """The int64 [S] node `p` such that `mask[..., i, j] == (j <= p[i])`, or None when that cannot be shown.

    `user` is the attention node: the positions must not be written between the comparison and there.
    """
    compare = _peel(mask)
    call = spelling.read(compare)
    if call is None or call.name not in ("le", "ge"):
        return None
    keys, queries = (call.args["x"], call.args["other"]) if call.name == "le" else (call.args["other"], call.args["x"])
    key_axis, key_vector = _axis(keys)
    query_axis, positions = _axis(queries)
    if key_axis != 1 or query_axis != 2 or key_vector is None or positions is None:
        return None
    fake = spelling.fake(positions)
    if fake.dtype != torch.int64 or not statically_known_true(fake.shape[0] == seq) or not fake.is_contiguous():
        return None
    if not _counts_from_zero(key_vector) or not statically_known_true(spelling.fake(key_vector).shape[0] == length):
        return None
    return None if _written(ctx, mask, positions, user) else positions


def _written(ctx: Context, mask: Node, positions: Node, user: Node) -> bool:
    """Whether anything from the positions to the mask is written to before the attention reads it."""
    order, pending, seen = ctx.writes.order, [mask], {positions}
    while pending:
        node = pending.pop()
        if any(ctx.writes.between(order[node], order[user], storage_ids(node))):
            return True
        fresh = [n for n in node.all_input_nodes if n not in seen and n.op != "placeholder"]
        seen.update(fresh)
        pending += fresh
    return any(ctx.writes.between(order[positions], order[user], storage_ids(positions)))


def _peel(node: Any) -> Any:
    """See through what does not change a mask: expand, device moves on one device, `true & mask`."""
    while (call := spelling.read(node)) is not None:
        both = (node, call.args.get("x"))
        device_move = call.name == "cast" and all(spelling.fake(n).dtype == torch.bool for n in both)
        if call.name == "expand" or device_move:
            node = call.args["x"]
        elif call.name == "and" and _all_true(call.args["x"]):
            node = call.args["other"]
        elif call.name == "and" and _all_true(call.args["other"]):
            node = call.args["x"]
        else:
            break
    return node


def _all_true(node: Any) -> bool:
    call = spelling.read(node)
    return call is not None and call.name == "new_ones" and spelling.fake(node).dtype == torch.bool


def _axis(node: Any) -> tuple[int | None, Node | None]:
    """For `vector[None, :, None]`: how far from the right the vector's axis is (1: last), and the vector."""
    call = spelling.read(node)
    if call is None or call.name != "getitem" or not isinstance(call.args["index"], tuple):
        return None, None
    index, vector = call.args["index"], call.args["x"]
    value = spelling.fake(vector)
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or any(i is not None and i != _FULL for i in index):
        return None, None
    if index.count(_FULL) != 1:
        return None, None
    return len(index) - index.index(_FULL), vector


def _counts_from_zero(node: Node) -> bool:
    """Whether the node is `arange(n)` or `arange(n) + 0`."""
    call = spelling.read(node)
    if call is not None and call.name == "add":
        if call.args["other"] != 0 or "alpha" in call.args:
            return False
        call = spelling.read(call.args["x"])
    plain = call is not None and call.name == "arange" and set(call.args) <= {"start", "device", "dtype"}
    return plain and spelling.fake(node).dtype == torch.int64
