"""kv_gather -> [repeat_kv] -> scaled_dot_product_attention -> [transpose, contiguous]  ->  qwenopt::paged_attention

A call of it that stands there already (Hugging Face continuous batching) is taken note of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.adopt import adopt
from qwenopt.graphs.attention import Attention, read_attention
from qwenopt.graphs.causal_mask import query_positions
from qwenopt.graphs.context import Context
from qwenopt.ops import KV_GATHER, PAGED_ATTENTION, PAGED_MASK


def raise_paged_attention(ctx: Context) -> None:
    """Raise every attention whose keys and values are gathered from pages; the gather goes."""
    adopt(ctx, PAGED_ATTENTION)
    masks = []
    for node in list(ctx.graph.nodes):
        call = spelling.read(node)
        if call is None or call.name != "sdpa":
            continue
        gather = _gather_of(call.args["k"])
        if gather is None:
            continue
        found = read_attention(node, call.args)
        if isinstance(found, str):
            ctx.miss(PAGED_ATTENTION, node, found)
        else:
            masks.append(_raise(ctx, node, found, gather))
    ctx.sweep(masks)


def _gather_of(keys: Any) -> Node | None:
    """The kv_gather that the keys of an attention come from, seen through views."""
    node = keys
    while isinstance(node, Node):
        if node.target is KV_GATHER.default:
            return node
        call = spelling.read(node)
        if call is None or call.name not in ("view", "expand", "getitem"):
            return None
        node = call.args["x"]
    return None


@dataclass(frozen=True)
class _Seen:
    """What tells which keys a query sees, in the words of paged_attention."""

    q_starts: Node | None = None
    positions: Node | None = None
    mask: Node | None = None
    window: int = 0
    note: str = ""


def _raise(ctx: Context, node: Node, found: Attention, gather: Node) -> Any:
    """Raise one attention. Returns the mask node that it does not need any more, if there is one."""
    items = [spelling.read(n) for n in (found.k, found.v)]
    if [c and (c.name, c.args["x"], c.args["index"]) for c in items] != [
        ("getitem", gather, 0),
        ("getitem", gather, 1),
    ]:
        ctx.miss(PAGED_ATTENTION, node, "keys and values are not the two results of one gather")
        return None
    *pools, block_table, packed, _ = gather.args
    seen = _seen(ctx, node, found, bool(packed))
    if isinstance(seen, str):
        ctx.miss(PAGED_ATTENTION, node, seen)
        return None
    args = (found.q, *pools, block_table, seen.q_starts, seen.positions, seen.mask, seen.window, found.scale)
    interior = [*found.interior, found.k, found.v, gather]
    done = ctx.replace(PAGED_ATTENTION, [found.root], interior, args, adapt=found.adapt, note=seen.note)
    return found.mask if done is not None and seen.mask is None else None


def _seen(ctx: Context, node: Node, found: Attention, packed: bool) -> _Seen | str:
    mask = found.mask
    if found.is_causal:
        return "is_causal over gathered pages: their number is not that of the queries"
    if packed:
        if not isinstance(mask, Node) or mask.target is not PAGED_MASK.default:
            return "packed rows under a mask that is not qwenopt::paged_mask"
        q_starts, positions, _, window = mask.args
        return _Seen(q_starts, positions, None, window, "packed rows: reads only the keys present")  # type: ignore[arg-type]
    if mask is None:
        return "a batch over gathered pages without a mask: it would see places that hold no token"
    seq, length = spelling.fake(found.q).shape[2], spelling.fake(found.k).shape[2]
    positions = query_positions(ctx, mask, node, seq, length)
    if positions is not None:
        return _Seen(positions=positions, note="causal, proven from the mask: reads only the keys present")
    return _Seen(mask=mask, note="mask honoured, invisible blocks skipped")
