"""The choice of a kernel for every raised op, made once, on fake arguments, before either lowering."""

from __future__ import annotations

from collections.abc import Iterable

from qwenopt.graphs import Raised, spelling

# Ops whose time is not a rounding error. One of them without a kernel is a reason to let Inductor have the graph.
HEAVY_OPS = frozenset({"linear", "attention", "paged_attention", "moe_experts"})


def choose(raised: Iterable[Raised]) -> None:
    """Set the provider of each raised node and note it, or the reason for the reference, at its site."""
    for r in raised:
        choice = r.op.choose([spelling.fake(a) for a in r.node.args])
        r.provider = choice.provider
        r.site.provider = "reference" if choice.provider is None else choice.provider.name
        r.site.fallback = choice.reason


def heavy_without_kernel(raised: Iterable[Raised]) -> str | None:
    """The first heavy op that only its reference serves, with the reason; None when each has a kernel."""
    for r in raised:
        if r.provider is None and r.op.name in HEAVY_OPS:
            return f"no kernel for {r.op.name} at {r.site.module}: {r.site.fallback}"
    return None
