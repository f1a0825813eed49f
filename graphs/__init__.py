"""What to look for in a Qwen3 graph and what to put there: Dynamo's FX graph -> the same graph on `qwenopt::` ops."""

from __future__ import annotations

if __name__ != "qwenopt.graphs":
    raise ImportError("import qwenopt.graphs, not graphs: a second copy of the package would match everything twice")

from collections.abc import Callable, Collection, Sequence

from torch.fx import GraphModule

from qwenopt.graphs.add_rms_norm import raise_add_rms_norm
from qwenopt.graphs.advance import merge_advances
from qwenopt.graphs.attention import raise_attention
from qwenopt.graphs.budget_step import raise_budget_guard, raise_budget_step
from qwenopt.graphs.canonicalize import canonicalize
from qwenopt.graphs.context import Context, Raised
from qwenopt.graphs.functionalize import functionalize
from qwenopt.graphs.kv_append import raise_kv_append
from qwenopt.graphs.kv_reserve import hoist_kv_reserve
from qwenopt.graphs.linear import raise_linear
from qwenopt.graphs.linear_add_rms_norm import merge_linear_add_rms_norm
from qwenopt.graphs.linear_argmax import merge_linear_argmax
from qwenopt.graphs.linear_group import merge_linear_group
from qwenopt.graphs.linear_silu_mul import merge_linear_silu_mul
from qwenopt.graphs.logit_signals import raise_logit_signals
from qwenopt.graphs.merging import Merging
from qwenopt.graphs.moe_experts import raise_moe_experts
from qwenopt.graphs.moe_route import raise_moe_route
from qwenopt.graphs.outer_product import multiply_outer_products
from qwenopt.graphs.paged_attention import raise_paged_attention
from qwenopt.graphs.qk_norm_rope import raise_qk_norm_rope
from qwenopt.graphs.qk_norm_rope_append import merge_qk_norm_rope_append
from qwenopt.graphs.qk_norm_rope_static_append import merge_qk_norm_rope_static_append
from qwenopt.graphs.rms_norm import raise_rms_norm
from qwenopt.graphs.silu_mul import raise_silu_mul
from qwenopt.graphs.top_tokens import raise_top_tokens
from qwenopt.ops import OPS

Pass = Callable[[Context], None]

# The order of all passes. The name is the op whose sites the pass makes (what `disable` names); "" always runs.
PASSES: list[tuple[str, Pass]] = [
    ("", canonicalize),  # first: every pattern below is written without no-op casts
    ("", multiply_outer_products),  # anywhere: no pattern below has a product of one column by one row
    ("", functionalize),  # before moe_experts, whose rows some versions of transformers mask in place
    ("moe_experts", raise_moe_experts),  # before silu_mul: the expert MLP contains one
    ("moe_route", raise_moe_route),  # after moe_experts: then the router's results have one reader each
    ("qk_norm_rope", raise_qk_norm_rope),  # before rms_norm: query and key norms would be taken for layer norms
    ("logit_signals", raise_logit_signals),  # anywhere: it only takes note of calls that are there
    ("budget_guard", raise_budget_guard),  # the same
    ("top_tokens", raise_top_tokens),  # the same
    ("budget_step", raise_budget_step),  # the same
    ("kv_append", raise_kv_append),  # anywhere: it only takes note of calls that are there
    ("paged_attention", raise_paged_attention),  # before attention, which would take what is left of the gather
    ("attention", raise_attention),  # anywhere after that; before linear, which it feeds
    ("rms_norm", raise_rms_norm),
    ("add_rms_norm", raise_add_rms_norm),  # after rms_norm: it is the sum in front of a raised norm
    ("silu_mul", raise_silu_mul),
    ("linear", raise_linear),  # anywhere: single nodes, nothing depends on them
    ("", hoist_kv_reserve),  # last: it moves a write, and all others ask where writes are
]

# What several raised nodes become where one kernel does their work, and the order. On other devices nothing is merged.
MERGES: list[tuple[str, Callable[[Merging], None]]] = [
    ("linear_silu_mul", merge_linear_silu_mul),  # before linear_group: gate and up are products of one x, too
    ("linear_add_rms_norm", merge_linear_add_rms_norm),  # before it, too: what feeds a norm is worth more there
    ("linear_argmax", merge_linear_argmax),  # before it, too, should there be another product of what lm_head is given
    ("linear_group", merge_linear_group),
    ("qk_norm_rope_append", merge_qk_norm_rope_append),  # anywhere
    ("qk_norm_rope_static_append", merge_qk_norm_rope_static_append),  # anywhere
    ("", merge_advances),  # after it: it moves the counting behind each layer's append
]


def raise_graph(gm: GraphModule, *, disable: Collection[str] = (), verify: bool = False) -> Context:
    """Rewrite a Dynamo graph in place onto `qwenopt::` ops; returns the context with sites, raised nodes and misses."""
    ctx = Context(gm, verify=verify)
    for name, run in PASSES:
        if name not in disable:
            run(ctx)
    gm.graph.lint()
    gm.recompile()
    return ctx


def merge_graph(gm: GraphModule, raised: Sequence[Raised], *, disable: Collection[str] = ()) -> list[Raised]:
    """Merge raised nodes, whose providers have been chosen, in place; returns what is raised now, merged or not.

    Ops that have no kernel on the graph's device are not looked for.
    """
    merging = Merging(gm, list(raised))
    devices = {r.provider.device for r in raised if r.provider is not None}
    for name, run in MERGES:
        if not name or (name not in disable and any(p.device in devices for p in OPS[name].providers)):
            run(merging)
    gm.graph.lint()
    gm.recompile()
    return merging.raised


__all__ = ["MERGES", "PASSES", "Context", "Raised", "merge_graph", "raise_graph"]
