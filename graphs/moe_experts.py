"""sorted rows -> grouped_mm -> silu*up -> grouped_mm -> weighted sum, or the same by bmm  ->  qwenopt::moe_experts"""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context
from qwenopt.graphs.pattern import Cast, Const, Either, Match, Op, Pattern, any_, item, mul, unary
from qwenopt.ops import MOE_EXPERTS


def _flat(name: str) -> Pattern:
    return Op("view", {"x": any_(name), "shape": Const((-1,))})


def _last(x: Pattern) -> Pattern:
    return Op("unsqueeze", {"x": x, "dim": Const(-1)})


def _gated(projected: Pattern) -> Pattern:
    halves = Op("chunk", {"x": projected, "chunks": Const(2), "dim": Const(-1)}, bind="halves")
    gate, up = item(halves, 0), item(any_("halves"), 1)
    return mul(unary("silu", gate, inplace=(False,)), up)


# grouped_mm: rows sorted by expert, two grouped products, rows put back by the inverse permutation.
_SORT = Op("sort", {"x": _flat("indices")}, bind="sorted")
_PERM = item(_SORT, 1, bind="perm")
_COUNTS = Op(
    "histc",
    {"x": Cast(item(any_("sorted"), 0)), "bins": any_("experts"), "min": Const(0), "max": any_("last_expert")},
)
_OFFSETS = Op("cumsum", {"x": _COUNTS, "dim": Const(0), "dtype": any_("offset_dtype")}, bind="offsets")


# Rows whose expert id is the number of experts belong to another rank; the op skips them, here they are zeroed.
_NOT_MINE = _last(Op("ge", {"x": item(any_("sorted"), 0), "other": any_("experts")}))


def _masked(rows: Pattern) -> Pattern:
    return Either((Op("masked_fill", {"x": rows, "mask": _NOT_MINE, "value": Const(0.0)}), rows))


def _grouped(x: Pattern, weight: str, offsets: Pattern) -> Pattern:
    matrix = Op("transpose", {"x": any_(weight), "dim0": Const(-2), "dim1": Const(-1)})
    return _masked(Op("grouped_mm", {"offs": offsets, "x": Cast(x), "weight": matrix}))


_ROWS = _masked(item(any_("x"), Op("floordiv", {"x": _PERM, "other": any_("top_k")})))
_DOWN = _grouped(_gated(_grouped(_ROWS, "gate_up", _OFFSETS)), "down", any_("offsets"))
_WEIGHTED = _masked(mul(_DOWN, _last(item(_flat("weights"), any_("perm")))))
_INVERSE = Op("empty_like", {"x": any_("perm")}, bind="inverse")
_GROUPED = item(_WEIGHTED, _INVERSE, bind="gathered")


# batched_mm: the weights of each (token, slot) gathered, two batched products.
def _batched(x: Pattern, weight: str, ids: Pattern) -> Pattern:
    return Op("squeeze", {"x": Op("bmm", {"x": item(any_(weight), ids), "other": _last(x)}), "dim": Const(-1)})


_IDS = Either(
    (_flat("indices"), Op("clamp", {"x": _flat("indices"), "min": Const(0), "max": any_("last_expert")})),
)
_REPEATED = Op("repeat_interleave", {"x": any_("x"), "repeats": any_("top_k"), "dim": Const(0)})
_BATCHED = mul(
    _batched(_gated(_batched(_REPEATED, "gate_up", _IDS)), "down", _IDS),
    _last(_flat("weights")),
)

PATTERN = Op(
    "sum",
    {"x": Op("view", {"x": Either((_GROUPED, _BATCHED)), "shape": any_("combined_shape")}), "dim": Const(1)},
)


def raise_moe_experts(ctx: Context) -> None:
    """Raise the expert MLPs of every mixture-of-experts layer."""
    for m in ctx.find(MOE_EXPERTS, "sum", PATTERN):
        reason = _mismatch(m)
        if reason is not None:
            ctx.miss(MOE_EXPERTS, m.root, reason)
            continue
        args = (m["x"], m["indices"], m["weights"], m["gate_up"], m["down"])
        ctx.replace(MOE_EXPERTS, [m.root], m.interior, args)


def _mismatch(m: Match) -> str | None:
    """What the tree alone does not say: matching sizes, and how the inverse permutation is filled."""
    indices, x = spelling.fake(m["indices"]), spelling.fake(m["x"])
    top_k = m["top_k"]
    if indices.dim() != 2 or not statically_known_true(indices.shape[1] == top_k):
        return f"expert ids {tuple(indices.shape)} do not have top_k {top_k} columns"
    expected = (indices.shape[0], top_k, x.shape[-1])
    view = next(n for n in m.interior if (c := spelling.read(n)) is not None and c.name == "view")
    shape = spelling.fake(view).shape
    if len(shape) != 3 or not all(statically_known_true(a == b) for a, b in zip(shape, expected, strict=True)):
        return f"the weighted rows are summed as {tuple(shape)}, not as (T, K, N) = {expected}"
    experts = spelling.fake(m["gate_up"]).shape[0]
    counted, last = m.captures.get("experts", experts), m.captures.get("last_expert", experts - 1)
    if counted != experts or last != experts - 1:
        return f"tokens are counted for {counted} experts 0..{last}, there are {experts}"
    return _fill_of_inverse(m) if "inverse" in m.captures else None


def _fill_of_inverse(m: Match) -> str | None:
    """Check that the inverse is filled by `inverse[perm] = arange(n)` and take the filling into the match."""
    inverse: Node = m["inverse"]
    others = [u for u in inverse.users if u is not m["gathered"]]
    if len(others) != 1 or getattr(others[0].target, "__name__", "") != "setitem":
        return "the inverse permutation is not filled by one assignment"
    fill = others[0]
    perm: Node = m["perm"]
    _, where, values = fill.args
    if where is not perm or not isinstance(values, Node) or not _counts_rows(values, perm):
        return "the inverse permutation is not filled with perm -> arange(n)"
    m.interior += [fill, values, *_sizes_of(perm, values)]
    return None


def _sizes_of(perm: Node, values: Node) -> list[Node]:
    """With a symbolic number of rows: the nodes that ask perm for it, for `arange(perm.size(0))`."""
    asked = [n for n in values.all_input_nodes if (c := spelling.read(n)) is not None and c.name == "size"]
    return [n for n in asked if n.args[0] is perm and set(n.users) == {values}]


def _counts_rows(values: Any, perm: Node) -> bool:
    call = spelling.read(values)
    if call is None or call.name != "arange" or not set(call.args) <= {"start", "device", "dtype"}:
        return False
    return statically_known_true(spelling.fake(values).shape[0] == spelling.fake(perm).shape[0])
