"""runs of nodes that are native calls and views  ->  one node that makes all those calls at once

A decode step of a small model is hundreds of native calls of some microseconds each. Made one by one from Python they
cost as much again, and each call starts its threads anew. A plan makes them in one call: the threads start once and
meet at barriers (csrc/cpu/plan.cpp). Intermediate results lie in an arena that is kept between calls; what leaves the
plan is allocated for each call, as any op would.

What cannot be a step (an op without a native kernel, a shape that is only known at run time) stays in Python, between
two plans or instead of one. A plan is recorded from the nodes for each number of threads; when a tensor comes with
other strides than Dynamo foretold, the nodes are called one after another instead, as without a plan.

Where the number of tokens is a symbol, as in steps that read prompts, there is a plan for each number that comes again
(`SizedPlanned`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from qwenopt import native
from qwenopt.graphs import Raised, spelling
from qwenopt.lowering import plan_symbols
from qwenopt.lowering.plan_recording import Recording
from qwenopt.lowering.planned import Planned, SizedPlanned
from qwenopt.ops.steps import NotPlanned

# A run with fewer heavy steps is not worth its bookkeeping: it is the few ops between two that stay in Python.
MIN_HEAVY_STEPS = 4


@dataclass
class Installed:
    """What `install` did: the number of steps of each plan, and how many nodes stay in Python for which reason."""

    steps: list[int] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)

    def broke(self, reason: str) -> None:
        self.breaks[reason] = self.breaks.get(reason, 0) + 1


def install(gm: GraphModule, raised: Iterable[Raised]) -> Installed:
    """Replace runs of nodes by calls of plans. The raised nodes' targets must be their kernels."""
    ops = {r.node: r for r in raised}
    done = Installed()
    if native.why_not() is not None:
        done.broke(str(native.why_not()))
        return done
    _drop_unused_numbers(gm.graph)
    kind: type[Planned] = Planned
    runs = _runs(gm.graph, ops, done)
    if not runs and (sizes := _sizes(gm.graph)):
        done.breaks.clear()  # they were of a plan for all sizes
        kind, runs = SizedPlanned, _runs(gm.graph, ops, done, sizes)
    for nodes in runs:
        planned = _replace(gm, nodes, ops, kind, f"plan_{len(done.steps)}", done)
        if planned is not None:
            done.steps.append(planned.prepare().plan.num_steps)
    return done


def _sizes(graph: Graph) -> dict[Any, int]:
    """The present value of each symbol in the sizes of what the graph computes."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    symbols = plan_symbols.computed(node for node in graph.nodes if node.op.startswith("call"))
    return plan_symbols.hints(inputs, symbols)


def _drop_unused_numbers(graph: Graph) -> None:
    """Erase what computes a size that nobody asks for: Dynamo leaves such nodes between the layers."""
    for node in reversed(graph.nodes):
        if node.op.startswith("call") and not node.users and isinstance(spelling.fake(node), int | SymInt | torch.Size):
            graph.erase_node(node)


def _runs(
    graph: Graph, ops: Mapping[Node, Raised], done: Installed, sizes: Mapping[Any, int] | None = None
) -> list[list[Node]]:
    """Maximal runs of consecutive nodes that can be recorded; what ends one is noted once the first has begun."""
    threads = torch.get_num_threads()
    runs: list[list[Node]] = []
    recording, nodes = Recording(ops, threads, sizes), list[Node]()

    def close() -> None:
        nonlocal recording, nodes
        if recording.num_heavy >= MIN_HEAVY_STEPS:
            runs.append(nodes)
        recording, nodes = Recording(ops, threads, sizes), []

    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        try:
            recording.add(node)
        except NotPlanned as error:
            if nodes or runs:
                done.broke(str(error))
            close()
            continue
        nodes.append(node)
    close()
    return [trimmed for run in runs if (trimmed := _trim(run, ops))]


def _trim(nodes: list[Node], ops: Mapping[Node, Raised]) -> list[Node]:
    """The run from its first raised op on: what precedes it is not worth a step."""
    first = next(i for i, node in enumerate(nodes) if node in ops)
    return nodes[first:]


def _replace(
    gm: GraphModule, nodes: list[Node], ops: Mapping[Node, Raised], kind: type[Planned], name: str, done: Installed
) -> Planned | None:
    """Put one call of a plan in the place of `nodes`; None, and nothing changed, where no plan can be made of them."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in inside))
    tensors = [a for a in inputs if isinstance(spelling.fake(a), Tensor)]
    given = [*tensors, *(a for a in inputs if a not in tensors and kind is SizedPlanned)]
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    inner = Graph()
    copies: dict[Node, Node] = {}
    for a in given:
        copies[a] = inner.placeholder(a.name)
        copies[a].meta = dict(a.meta)
    for node in nodes:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output([copies[node] for node in results])
    module = GraphModule(gm, inner, name)
    planned = kind(module, {copies[node]: ops[node] for node in nodes if node in ops}, name)
    try:
        planned.prepare()
    except NotPlanned as error:
        done.broke(str(error))
        return None
    with gm.graph.inserting_after(nodes[-1]):
        call = gm.graph.call_function(planned, tuple(given))
    last = call
    for i, node in enumerate(results):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(_item, (call, i))
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last, lambda user: user not in inside)
    for node in reversed(nodes):
        gm.graph.erase_node(node)
    return planned


def _item(values: tuple[Tensor, ...], index: int) -> Tensor:
    return values[index]


__all__ = ["Planned", "install"]
