"""[repeat_kv] -> scaled_dot_product_attention -> [transpose, contiguous]  ->  qwenopt::attention"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qwenopt.graphs import spelling
from qwenopt.graphs.causal_mask import query_positions
from qwenopt.graphs.context import Context
from qwenopt.ops import ATTENTION

_FULL = slice(None, None, None)
_ONE_AXIS_MORE = (_FULL, _FULL, None, _FULL, _FULL)


@dataclass(frozen=True)
class Attention:
    """An attention node that was read: keys and values before they were repeated, and what would go with the node.

    `root` is the node whose value the op gives, by way of `adapt` if that is set.
    """

    q: Node
    k: Node
    v: Node
    mask: Node | None
    is_causal: bool
    scale: float
    root: Node
    interior: list[Node]
    adapt: Callable[[Graph, Node], list[Node]] | None


def read_attention(node: Node, args: dict[str, Any]) -> Attention | str:
    """Read a scaled_dot_product_attention node, or say why it cannot be raised."""
    q, scale = args["q"], args.get("scale")
    if args.get("dropout_p", 0.0) != 0.0:
        return f"dropout_p={args['dropout_p']}"
    if spelling.fake(q).dim() != 4:
        return f"queries of {spelling.fake(q).dim()} dimensions, not (B, H, S, D)"
    if not isinstance(args.get("is_causal", False), bool) or isinstance(scale, Node):
        return "is_causal or scale is computed in the graph"
    interior = [node]
    k, v = (_without_repeat(args[name], node, interior) for name in ("k", "v"))
    scale = scale if scale is not None else spelling.fake(q).shape[-1] ** -0.5
    tail = _tail(node)
    return Attention(
        q,
        k,
        v,
        args.get("attn_mask"),
        args.get("is_causal", False),
        scale,
        tail[-1] if tail else node,
        [*tail, *interior],
        _transposed if tail else None,
    )


def raise_attention(ctx: Context) -> None:
    """Raise every scaled dot-product attention; a mask that is proven causal becomes query positions."""
    masks = []
    for node in list(ctx.graph.nodes):
        call = spelling.read(node)
        if call is None or call.name != "sdpa":
            continue
        found = read_attention(node, call.args)
        if isinstance(found, str):
            ctx.miss(ATTENTION, node, found)
        else:
            masks.append(_raise(ctx, node, found))
    ctx.sweep(masks)


def _raise(ctx: Context, node: Node, found: Attention) -> Any:
    """Raise one attention node. Returns the mask node that it does not need any more, if there is one."""
    mask = found.mask
    seq, length = spelling.fake(found.q).shape[2], spelling.fake(found.k).shape[2]
    positions = query_positions(ctx, mask, node, seq, length) if mask is not None else None
    left = None if positions is not None else mask
    args = (found.q, found.k, found.v, left, positions, found.is_causal, found.scale)
    ctx.replace(ATTENTION, [found.root], found.interior, args, adapt=found.adapt, note=_note(args))
    return mask if positions is not None else None


def _note(args: tuple[Any, ...]) -> str:
    mask, positions, is_causal = args[3:6]
    if positions is not None:
        return "causal, proven from the mask: reads only the keys present"
    if mask is not None:
        return "mask honoured, invisible blocks skipped"
    return "causal" if is_causal else "all keys visible"


def _transposed(graph: Graph, call: Node) -> list[Node]:
    return [graph.call_method("transpose", (call, 1, 2))]


def _tail(node: Node) -> list[Node]:
    """The nodes that turn the result into a contiguous [B, S, H, D], when they follow and nobody else looks."""
    tail: list[Node] = []
    shape = spelling.fake(node).shape
    while len(node.users) == 1:
        user = next(iter(node.users))
        call = spelling.read(user)
        if call is None:
            return []
        if call.name == "view" and not tail and _same_shape(spelling.fake(user).shape, shape):
            pass
        elif call.name == "transpose" and sorted((call.args["dim0"], call.args["dim1"])) == [1, 2]:
            if any(spelling.read(t).name == "transpose" for t in tail):  # type: ignore[union-attr]
                return []
        elif call.name == "contiguous" and len(user.args) == 1 and not user.kwargs:
            return [*tail, user] if tail and spelling.read(tail[-1]).name == "transpose" else []  # type: ignore[union-attr]
        else:
            return []
        tail.append(user)
        node = user
    return []


def _same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _without_repeat(value: Node, user: Node, interior: list[Node]) -> Node:
    """Keys or values before `repeat_kv` (one more axis, expand, reshape), when only this attention uses the copies."""
    chain = [value]
    for name in ("view", "expand", "getitem"):
        call = spelling.read(chain[-1])
        if call is None or call.name != name or not _only_used_by(chain[-1], chain[-2] if len(chain) > 1 else user):
            return value
        chain.append(call.args["x"])
    reshaped, expanded, indexed, base = chain
    index = spelling.read(indexed).args["index"]  # type: ignore[union-attr]
    shape, full = spelling.fake(base).shape, spelling.fake(expanded).shape
    ok = index == _ONE_AXIS_MORE and len(shape) == 4 and len(full) == 5
    ok = ok and _same_shape(spelling.fake(reshaped).shape, (shape[0], shape[1] * full[2], shape[2], shape[3]))
    if not ok or not _same_shape(full, (shape[0], shape[1], full[2], shape[2], shape[3])):
        return value
    interior += chain[:-1]
    return base


def _only_used_by(node: Node, user: Node) -> bool:
    return set(node.users) == {user}
