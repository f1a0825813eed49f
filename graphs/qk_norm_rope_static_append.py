"""keys.index_copy_(2, p, qk_norm_rope(q, k, ...)[1]), values.index_copy_(2, p, v), with p = arange(S) + length
->  qwenopt::qk_norm_rope_static_append
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qwenopt.graphs import spelling
from qwenopt.graphs.merging import Merging, is_advance, items
from qwenopt.ops import QK_NORM_ROPE, QK_NORM_ROPE_STATIC_APPEND


@dataclass(frozen=True)
class _Append:
    """The writes of a layer of a static cache: both copies, how their places are computed, the values, the length."""

    copies: tuple[Node, Node]
    places: list[Node]
    v: Node
    length: Node


def merge_qk_norm_rope_static_append(merging: Merging) -> None:
    """Merge the rotation of keys with their way into a static cache, if nobody else wants them."""
    for rope in merging.of(QK_NORM_ROPE):
        queries, keys = (items(rope.node).get(i) for i in (0, 1))
        append = None if keys is None else _read(keys)
        if queries is None or append is None:
            continue
        last = max(append.copies, key=merging.position)
        for user in list(append.length.users):  # it is counted on between the places and the copies
            if is_advance(user) and merging.position(user) < merging.position(last):
                merging.move_behind(user, last)
        cache = [copy.args[0] for copy in append.copies]
        args = (*rope.node.args, *cache, append.v, append.length)
        others = (*append.copies, *append.places)
        merging.replace(QK_NORM_ROPE_STATIC_APPEND, (rope,), args, {queries: None}, at=last, others=others)


def _read(keys: Node) -> _Append | None:
    """How these keys [B, G, S, D] are written to a static cache, if that is all that becomes of them."""
    copy = _copy(keys)
    if copy is None or not isinstance(copy.args[2], Node):
        return None
    places = copy.args[2]
    others = [user for user in places.users if user is not copy]
    if len(others) != 1 or _copy(others[0].args[-1]) is not others[0] or others[0].args[2] is not places:
        return None
    v, counted = others[0].args[3], _counted(places, spelling.fake(keys).shape[2])
    if counted is None or not isinstance(v, Node):
        return None
    counts, length = counted
    return _Append((copy, others[0]), [places, *([counts] if len(counts.users) == 1 else [])], v, length)


def _copy(source: Any) -> Node | None:
    """The one `cache.index_copy_(2, places, source)` of a source, whose result nobody uses."""
    users = source.users if isinstance(source, Node) else ()
    found = [user for user in users if user.op == "call_method" and user.target == "index_copy_"]
    if len(found) != 1 or found[0].kwargs or found[0].users or len(found[0].args) != 4:
        return None
    return found[0] if found[0].args[1] in (2, -2) and found[0].args[3] is source else None


def _counted(places: Node, seq: Any) -> tuple[Node, Node] | None:
    """`arange(seq)` and `length` where the places are their sum."""
    call = spelling.read(places)
    if call is None or call.name != "add" or set(call.args) != {"x", "other"}:
        return None
    counts, length = call.args["x"], call.args["other"]
    arange = spelling.read(counts)
    if arange is None or arange.name != "arange" or not set(arange.args) <= {"start", "device"}:
        return None
    if not isinstance(length, Node) or not statically_known_true(spelling.fake(counts).shape[0] == seq):
        return None
    return counts, length
