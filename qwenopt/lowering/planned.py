"""a run of nodes as a module  ->  a callable that makes all its native calls at once"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwenopt.graphs import Raised, spelling
from qwenopt.lowering import plan_symbols
from qwenopt.lowering.plan_recording import Recording
from qwenopt.lowering.plan_run import NativePlan, compile_plan
from qwenopt.ops.steps import NotPlanned

# Plans of one run for several sizes; each has an arena of its own, 20 MB for 512 tokens of the 0.6B model. Sizes that
# came once are remembered apart from them, so that prompts of many lengths do not push out the plan of decoding.
MOST_SIZES = 4
MOST_ONCE = 4


class Planned:
    """The callable that stands for a run of nodes: called with the run's inputs, returns its outputs.

    With `on_profile` set, each call tells it the steps' names and seconds.
    """

    def __init__(self, module: GraphModule, ops: Mapping[Node, Raised], name: str) -> None:
        self.module, self.ops, self.__name__ = module, ops, name
        self.placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.on_profile: Callable[[list[tuple[str, float]]], None] | None = None
        self._plans: dict[int, NativePlan] = {}

    def prepare(self) -> NativePlan:
        """The plan for torch's present number of threads; raises NotPlanned where there can be none."""
        threads = torch.get_num_threads()
        if threads not in self._plans:
            self._plans[threads] = self._record(threads)
        return self._plans[threads]

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        return self._run(self.prepare(), inputs, inputs)

    def _run(self, plan: NativePlan | None, inputs: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the plan on the tensors among the inputs; without one that fits, the nodes."""
        if plan is None or not plan.fits(tensors):
            return self.module(*inputs)  # type: ignore[no-any-return]
        if self.on_profile is not None:
            results, spent = plan.profile(tensors)
            self.on_profile(spent)
            return results
        return plan(tensors)

    def listing(self) -> str:
        """The steps, a line each; a rule where all threads meet."""
        lines = [f"# {self.__name__}: {len(self.ops)} ops"]
        for name, barrier in self.prepare().steps:
            lines.append(f"#   {name}")
            lines += ["#   ---"] * barrier
        return "\n".join(lines)

    def _record(self, threads: int, sizes: Mapping[Any, int] | None = None) -> NativePlan:
        recording = Recording(self.ops, threads, sizes)
        placeholders = [node for node in self.placeholders if isinstance(spelling.fake(node), Tensor)]
        for node in self.module.graph.nodes:
            if node.op not in ("placeholder", "output"):
                recording.add(node)
        results: Any = self.module.graph.output_node().args[0]
        return compile_plan(recording, placeholders, [recording.values[node] for node in results])


class SizedPlanned(Planned):
    """The same for a run whose sizes differ from call to call: a plan for each of the last few that came twice.

    Sizes are those of what the run computes: the number of tokens, not that of the pages in a pool. One that comes once
    (the end of a prompt, whose other pieces have one size) is not recorded: that takes 20 to 40 ms for the 0.6B model
    (2 cores of Granite Rapids, 2026-11-25), as much as its plan saves in two or three calls.
    """

    def __init__(self, module: GraphModule, ops: Mapping[Node, Raised], name: str) -> None:
        super().__init__(module, ops, name)
        symbols = plan_symbols.computed(node for node in module.graph.nodes if node.op.startswith("call"))
        self._symbols = plan_symbols.places(self.placeholders, symbols)
        hints = plan_symbols.hints(self.placeholders, symbols)
        if not hints:
            raise NotPlanned(f"sizes that no input tells: {symbols}")
        self._hints = tuple(hints[symbol] for symbol in self._symbols)
        self._num_tensors = sum(isinstance(spelling.fake(node), Tensor) for node in self.placeholders)
        # By threads and sizes, the last one used last: plans, and for what came once whether it was refused, since a
        # kernel may take some sizes and not others.
        self._sized: OrderedDict[tuple[int, ...], NativePlan] = OrderedDict()
        self._once: OrderedDict[tuple[int, ...], bool] = OrderedDict()
        self._lock = Lock()

    def prepare(self) -> NativePlan:
        """The plan for the sizes that Dynamo saw; raises NotPlanned where there can be none."""
        key = (torch.get_num_threads(), *self._hints)
        with self._lock:
            plan = self._sized.get(key)
            if plan is None:
                plan = self._for_sizes(key)
                _remember(self._sized, key, plan, MOST_SIZES)
        return plan

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        sizes = (inputs[i] if dim is None else inputs[i].shape[dim] for i, dim in self._symbols.values())
        key = (torch.get_num_threads(), *sizes)
        with self._lock:
            plan = self._find(key)
        return self._run(plan, inputs, inputs[: self._num_tensors])

    def _find(self, key: tuple[int, ...]) -> NativePlan | None:
        if key in self._sized:
            self._sized.move_to_end(key)
            return self._sized[key]
        refused = self._once.pop(key, None)
        if refused is False:
            try:
                plan = self._for_sizes(key)
            except NotPlanned:
                refused = True
            else:
                _remember(self._sized, key, plan, MOST_SIZES)
                return plan
        _remember(self._once, key, refused is True, MOST_ONCE)
        return None

    def _for_sizes(self, key: tuple[int, ...]) -> NativePlan:
        return self._record(key[0], dict(zip(self._symbols, key[1:], strict=True)))


def _remember(known: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """The last one used; the others, up to `most` in all, stay."""
    known[key] = value
    while len(known) > most:
        known.popitem(last=False)
