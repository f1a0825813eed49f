"""verify: true matches pass, a match whose reference computes something else is dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from qwenopt.graphs import Context, verify
from qwenopt.ops import OPS
from qwenopt.testing.capture import capture


def graph_of(fn: Any, *args: Tensor) -> torch.fx.GraphModule:
    kept: list[torch.fx.GraphModule] = []
    with torch.no_grad():
        torch.compile(fn, backend=lambda gm, inputs: kept.append(gm) or gm.forward)(*args)
    return kept[0]


def gate_nodes(gm: torch.fx.GraphModule) -> tuple[list[Node], list[Node], tuple[Node, ...]]:
    """Root, interior and arguments of the one activation times input in the graph."""
    inputs = tuple(n for n in gm.graph.nodes if n.op == "placeholder")
    interior = [n for n in gm.graph.nodes if n.op == "call_function"]
    return interior[-1:], interior, inputs


def test_true_match_does_not_differ() -> None:
    gm = graph_of(lambda a, b: F.silu(a) * b, torch.randn(4, 8), torch.randn(4, 8))
    roots, interior, args = gate_nodes(gm)
    assert verify.differs(OPS["silu_mul"], roots, interior, args, {}) is None


def test_wrong_match_differs() -> None:
    gm = graph_of(lambda a, b: F.gelu(a) * b, torch.randn(4, 8), torch.randn(4, 8))
    roots, interior, args = gate_nodes(gm)
    reason = verify.differs(OPS["silu_mul"], roots, interior, args, {})
    assert reason is not None
    assert "differs from the reference by" in reason


def test_swapped_arguments_differ() -> None:
    gm = graph_of(lambda a, b: F.silu(a) * b, torch.randn(4, 8), torch.randn(4, 8))
    roots, interior, args = gate_nodes(gm)
    assert verify.differs(OPS["silu_mul"], roots, interior, args[::-1], {}) is not None


def test_wrong_match_is_dropped_under_verify() -> None:
    for given, raised in ((False, 1), (True, 0)):
        torch.compiler.reset()
        gm = graph_of(lambda a, b: F.gelu(a) * b, torch.randn(4, 8), torch.randn(4, 8))
        ctx = Context(gm, verify=given)
        roots, interior, args = gate_nodes(gm)
        ctx.replace(OPS["silu_mul"], roots, interior, args)
        assert len(ctx.sites) == raised
        assert given is False or "verify" in ctx.failures["silu_mul"][0][1]


def test_verdict_of_one_site_is_not_that_of_another() -> None:
    seen: dict[Any, str | None] = {}
    verdicts = []
    for gate in (F.silu, F.gelu):
        torch.compiler.reset()
        gm = graph_of(lambda a, b, gate=gate: gate(a) * b, torch.randn(4, 8), torch.randn(4, 8))
        verdicts.append(verify.differs(OPS["silu_mul"], *gate_nodes(gm), seen))
    assert verdicts[0] is None
    assert verdicts[1] is not None


def test_verify_keeps_true_matches() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return F.silu(a) * b + F.linear(a, b)

    captured = capture(fn, torch.randn(8, 8), torch.randn(8, 8), verify=True)
    assert captured.counts == {"silu_mul": 1, "linear": 1}
