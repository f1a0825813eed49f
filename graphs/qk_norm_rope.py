"""rope(rms_norm(q)), rope(rms_norm(k))  ->  qwenopt::qk_norm_rope"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context
from qwenopt.graphs.pattern import Const, List, Match, Op, Pattern, When, add, any_, item, mul, unary
from qwenopt.graphs.rms_norm import OTHER_DTYPE, norm_input
from qwenopt.graphs.rms_norm import PATTERN as NORM
from qwenopt.ops import QK_NORM_ROPE


def _halves_of_head_dim(value: Any, m: Match) -> str | None:
    dim = spelling.fake(m["heads"]).shape[-1]
    low, high = m["low"], m["high"]
    ok = low == (Ellipsis, slice(None, dim // 2, None)) and high == (Ellipsis, slice(dim // 2, None, None))
    return None if ok else f"rotation by slices {low} and {high} of head_dim {dim}"


_HEADS: Pattern = Op("transpose", {"x": NORM, "dim0": Const(1), "dim1": Const(2)}, bind="heads")
_ROTATED = Op(
    "cat",
    {
        "tensors": List((unary("neg", item(any_("heads"), any_("high"))), item(any_("heads"), any_("low")))),
        "dim": Const(-1),
    },
)
PATTERN = When(add(mul(_HEADS, any_("cos")), mul(_ROTATED, any_("sin"))), _halves_of_head_dim)


def raise_qk_norm_rope(ctx: Context) -> None:
    """Raise query and key norms with their rotation, two by two: those that share one cos and one sin."""
    waiting: dict[tuple[Node, Node], Match] = {}
    for m in ctx.find(QK_NORM_ROPE, "add", PATTERN):
        tables = (m["cos"], m["sin"])
        if tables not in waiting:
            waiting[tables] = m
            continue
        _raise(ctx, waiting.pop(tables), m)
    for m in waiting.values():
        ctx.miss(QK_NORM_ROPE, m.root, "queries without keys on the same cos and sin")


def _raise(ctx: Context, q: Match, k: Match) -> None:
    cos, sin = (_table(node) for node in (q["cos"], q["sin"]))
    if cos is None or sin is None:
        ctx.miss(QK_NORM_ROPE, q.root, "cos and sin are not unsqueezed from (B, S, D)")
        return
    if q["eps"] != k["eps"]:
        ctx.miss(QK_NORM_ROPE, q.root, f"eps {q['eps']} of queries and {k['eps']} of keys differ")
        return
    q_input, k_input = norm_input(q), norm_input(k)
    if q_input is None or k_input is None:
        ctx.miss(QK_NORM_ROPE, q.root, OTHER_DTYPE)
        return
    args = (q_input, k_input, q["weight"], k["weight"], cos, sin, q["eps"])
    interior = list(dict.fromkeys([*q.interior, *k.interior]))
    if ctx.replace(QK_NORM_ROPE, [q.root, k.root], interior, args) is not None:
        ctx.sweep([q["cos"], q["sin"]])


def _table(node: Any) -> Node | None:
    """The [B, S, D] table behind `table.unsqueeze(1)`."""
    call = spelling.read(node)
    if call is None or call.name != "unsqueeze" or call.args.get("dim") != 1:
        return None
    return call.args["x"]  # type: ignore[no-any-return]
