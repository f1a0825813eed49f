"""softmax -> topk -> [divide by the sum] -> cast  ->  qwenopt::moe_route"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context
from qwenopt.graphs.pattern import Const, Either, Match, Op, When, any_
from qwenopt.ops import MOE_ROUTE


def _in_float32(value: Any, m: Match) -> str | None:
    dtype = spelling.fake(value).dtype
    return None if dtype == torch.float32 else f"softmax in {dtype}, not float32"


_SOFTMAX = When(
    Op("softmax", {"x": any_("logits"), "dim": Const(-1)}, allow={"dtype": (torch.float32,), "_stacklevel": (3,)}),
    _in_float32,
)
_TOPK = Op(
    "topk",
    {"x": _SOFTMAX, "k": any_("top_k")},
    allow={"dim": (-1, 1), "largest": (True,), "sorted": (True,)},
    bind="topk",
)
_VALUES = Op("getitem", {"x": _TOPK, "index": Const(0)}, bind="values")
_SUM = Op("sum", {"x": any_("values"), "dim": Const(-1), "keepdim": Const(True)})
_NORMALISED = Either(
    (Op("div_", {"x": _VALUES, "other": _SUM}), Op("div", {"x": _VALUES, "other": _SUM})),
)
PATTERN = Either((_NORMALISED, _VALUES))


def _indices(topk: Node) -> Node | None:
    """The one node that takes the indices out of `topk`, if it has no other users than values and indices."""
    taken = {u.args[1]: u for u in topk.users if spelling.read(u) is not None and len(u.args) == 2}
    return taken.get(1) if len(topk.users) == 2 and len(taken) == 2 else None


def _roots(ctx: Context) -> list[Node]:
    """Candidates from the result side: the division, or the values of a topk that nobody divides."""
    return [n for n in ctx.graph.nodes if (c := spelling.read(n)) is not None and c.name in ("div_", "div", "getitem")]


def raise_moe_route(ctx: Context) -> None:
    """Raise the router behind every gate projection."""
    for node in _roots(ctx):
        m = Match()
        if node._erased or not PATTERN.match(node, m):
            continue
        _raise(ctx, m)


def _raise(ctx: Context, m: Match) -> None:
    indices = _indices(m["topk"])
    if indices is None:
        ctx.miss(MOE_ROUTE, m["topk"], "the indices of topk are not taken out exactly once")
        return
    norm = len(m.interior) > 0 and spelling.read(m.root).name != "getitem"  # type: ignore[union-attr]
    root, logits = m.root, m["logits"]
    if not norm and any((c := spelling.read(u)) is not None and c.name in ("div", "div_", "sum") for u in root.users):
        return  # the division itself is the root of this match
    dtype = spelling.fake(logits).dtype
    casts = [u for u in root.users if (c := spelling.read(u)) is not None and c.name == "cast"]
    if spelling.fake(root).dtype != dtype:
        if len(casts) != 1 or len(root.users) != 1 or spelling.fake(casts[0]).dtype != dtype:
            ctx.miss(MOE_ROUTE, root, f"the weights are not cast to the dtype of the logits, {dtype}")
            return
        root = casts[0]
        m.consume(root)
    ctx.replace(MOE_ROUTE, [root, indices], [*m.interior, indices], (logits, m["top_k"], norm))
