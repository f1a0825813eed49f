"""runs of nodes that are native calls and views  ->  one node that makes all those calls at once

A decode step of a small model is hundreds of native calls of some microseconds each. Made one by one from Python they
cost as much again, and each call starts its threads anew. A plan makes them in one call: the threads start once and
meet at barriers (csrc/cpu/plan.cpp). Intermediate results lie in an arena that is kept between calls; what leaves the
plan is allocated for each call, as any op would.

What cannot be a step (an op without a native kernel, a shape that is only known at run time) stays in Python, between
two plans or instead of one. A plan is recorded from the nodes for each number of threads; when a tensor comes with
other strides than Dynamo foretold, the nodes are called one after another instead, as without a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from qwenopt import native
from qwenopt.graphs import Raised, spelling
from qwenopt.lowering import plan_nodes, plan_symbols
from qwenopt.lowering.plan_run import NativePlan, compile_plan
from qwenopt.ops.steps import Array, Buffer, NotPlanned, Steps

# A run with fewer heavy steps is not worth its bookkeeping: it is the few ops between two that stay in Python.
MIN_HEAVY_STEPS = 4
_HEAVY = frozenset({"linear", "moe_experts", "attention", "paged_attention"})


class Recording:
    """Nodes of one run while they are being recorded: the steps, and the array that each node's value has become."""

    def __init__(self, ops: Mapping[Node, Raised], threads: int) -> None:
        self.ops = ops
        self.steps = Steps(threads)
        self.values: dict[Node, Any] = {}
        self.inputs: list[Node] = []
        self.symbols = plan_symbols.Symbols()

    def add(self, node: Node) -> None:
        """Record `node`; raises NotPlanned where it cannot be, which ends the recording."""
        args: Any = map_arg(node.args, self._value)
        kwargs: Any = map_arg(node.kwargs, self._value)
        raised = self.ops.get(node)
        if raised is None:
            self.values[node] = plan_nodes.record(self.steps, node, args, kwargs)
        elif raised.provider is None or raised.provider.record is None:
            raise NotPlanned(f"{raised.op.name} has no kernel for plans here")
        else:
            self.values[node] = raised.provider.record(self.steps, *args)

    def _value(self, node: Node) -> Any:
        if node not in self.values:
            self.values[node] = self._outside(node)
            self.inputs.append(node)
        return self.values[node]

    def _outside(self, node: Node) -> Array:
        fake = spelling.fake(node)
        if not isinstance(fake, Tensor) or fake.device.type != "cpu" or fake.layout != torch.strided:
            raise NotPlanned(f"{node.name} is not a plain CPU tensor")
        shape = tuple(self.symbols.number(size, node, dim) for dim, size in enumerate(fake.shape))
        strides = tuple(self.symbols.number(stride) for stride in fake.stride())
        return Array(Buffer(), shape, strides, fake.dtype)

    @property
    def num_heavy(self) -> int:
        return sum(step.name in _HEAVY for step in self.steps.steps)


class Planned:
    """The callable that stands for a run of nodes: called with the run's inputs, returns its outputs.

    With `on_profile` set, each call tells it the steps' names and seconds.
    """

    def __init__(self, module: GraphModule, ops: Mapping[Node, Raised], name: str) -> None:
        self.module, self.ops, self.__name__ = module, ops, name
        self.on_profile: Callable[[list[tuple[str, float]]], None] | None = None
        self._plans: dict[int, NativePlan] = {}

    def prepare(self) -> NativePlan:
        """The plan for torch's present number of threads; raises NotPlanned where there can be none."""
        threads = torch.get_num_threads()
        if threads not in self._plans:
            self._plans[threads] = self._record(threads)
        return self._plans[threads]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        plan = self.prepare()
        if not plan.fits(inputs):
            return self.module(*inputs)  # type: ignore[no-any-return]
        if self.on_profile is not None:
            results, spent = plan.profile(inputs)
            self.on_profile(spent)
            return results
        return plan(inputs)

    def listing(self) -> str:
        """The steps, a line each; a rule where all threads meet."""
        lines = [f"# {self.__name__}: {len(self.ops)} ops"]
        for name, barrier in self.prepare().steps:
            lines.append(f"#   {name}")
            lines += ["#   ---"] * barrier
        return "\n".join(lines)

    def _record(self, threads: int) -> NativePlan:
        recording = Recording(self.ops, threads)
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        for node in self.module.graph.nodes:
            if node.op not in ("placeholder", "output"):
                recording.add(node)
        results: Any = self.module.graph.output_node().args[0]
        return compile_plan(recording, placeholders, [recording.values[node] for node in results])


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
    for nodes in _runs(gm.graph, ops, done):
        planned = _replace(gm, nodes, ops, f"plan_{len(done.steps)}", done)
        if planned is not None:
            done.steps.append(planned.prepare().plan.num_steps)
    return done


def _drop_unused_numbers(graph: Graph) -> None:
    """Erase what computes a size that nobody asks for: Dynamo leaves such nodes between the layers."""
    for node in reversed(graph.nodes):
        if node.op.startswith("call") and not node.users and isinstance(spelling.fake(node), int | SymInt):
            graph.erase_node(node)


def _runs(graph: Graph, ops: Mapping[Node, Raised], done: Installed) -> list[list[Node]]:
    """Maximal runs of consecutive nodes that can be recorded; what ends one is noted once the first has begun."""
    threads = torch.get_num_threads()
    runs: list[list[Node]] = []
    recording, nodes = Recording(ops, threads), list[Node]()

    def close() -> None:
        nonlocal recording, nodes
        if recording.num_heavy >= MIN_HEAVY_STEPS:
            runs.append(nodes)
        recording, nodes = Recording(ops, threads), []

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
    gm: GraphModule, nodes: list[Node], ops: Mapping[Node, Raised], name: str, done: Installed
) -> Planned | None:
    """Put one call of a plan in the place of `nodes`; None, and nothing changed, where no plan can be made of them."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(a for node in nodes for a in node.all_input_nodes if a not in inside))
    tensors = [a for a in inputs if isinstance(spelling.fake(a), Tensor)]
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    inner = Graph()
    copies: dict[Node, Node] = {}
    for a in tensors:
        copies[a] = inner.placeholder(a.name)
        copies[a].meta = dict(a.meta)
    for node in nodes:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output([copies[node] for node in results])
    module = GraphModule(gm, inner, name)
    planned = Planned(module, {copies[node]: ops[node] for node in nodes if node in ops}, name)
    try:
        planned.prepare()
    except NotPlanned as error:
        done.broke(str(error))
        return None
    with gm.graph.inserting_after(nodes[-1]):
        call = gm.graph.call_function(planned, tuple(tensors))
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
