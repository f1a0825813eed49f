"""The context of a raise: finds matches, proves a replacement safe, performs it, and records sites and misses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qwenopt.graphs import spelling, verify
from qwenopt.graphs.pattern import Match, Pattern
from qwenopt.graphs.storage import Writes, storage_ids
from qwenopt.ops import Op, Provider
from qwenopt.report import Site


@dataclass(eq=False)
class Raised:
    """A raised node: the op, the call node, the site in the report, and the provider that will serve it."""

    op: Op
    node: Node
    site: Site
    provider: Provider | None = None


@dataclass
class Context:
    """State of raising one graph; lives for one compilation."""

    gm: GraphModule
    verify: bool = False
    raised: list[Raised] = field(default_factory=list)
    failures: dict[str, list[tuple[Node, str]]] = field(default_factory=dict)
    _verified: dict[Any, str | None] = field(default_factory=dict)
    _layouts: dict[Any, tuple[bool, list[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.gm.graph
        self.writes = Writes(self.graph)

    @property
    def sites(self) -> list[Site]:
        """The sites of all raised nodes, in the order in which the passes found them."""
        return [r.site for r in self.raised]

    def find(self, op: Op, root: str, pattern: Pattern) -> Iterator[Match]:
        """Every match of `pattern` whose root reads as the canonical operation `root`, in program order.

        The reasons of attempts that came further than the root are kept for the report.
        """
        for node in list(self.graph.nodes):
            call = spelling.read(node)
            if call is None or call.name != root:
                continue
            m = Match()
            if pattern.match(node, m):
                yield m
            elif m.deepest > 1:
                self.miss(op, node, m.failure)

    def miss(self, op: Op, node: Node, reason: str) -> None:
        """Record why an op could not be raised at this node."""
        self.failures.setdefault(op.name, []).append((node, reason))

    def replace(
        self,
        op: Op,
        roots: Sequence[Node],
        interior: Sequence[Node],
        args: tuple[Any, ...],
        *,
        adapt: Callable[[torch.fx.Graph, Node], Sequence[Node]] | None = None,
        note: str = "",
    ) -> Raised | None:
        """Put `op(*args)` in place of the nodes `interior`, whose results are `roots`, if that is provably the same.

        `adapt(graph, call)` may add nodes after the call and returns the replacements of the roots in order; without
        it the roots are the call's result or, for several roots, its items. Returns None and records a miss when a
        check fails: outside users of the interior, a write in between, or another shape, dtype or stride.
        """
        reason = self._unsafe(roots, interior, args)
        if reason is None and self.verify:
            reason = verify.differs(op, roots, interior, args, self._verified)
        if reason is not None:
            self.miss(op, roots[0], reason)
            return None
        anchor = self._insertion_point(roots, args)
        if anchor is None:
            self.miss(op, roots[0], "an argument is computed after the first use of a result")
            return None
        with self.graph.inserting_before(anchor):
            call = self.graph.call_function(op.default, args)
        added = [call]
        self.writes.place(call, anchor)
        results = self._results(call, len(roots), added, anchor, adapt)
        reason = self._propagate(op, added) or differs_in_meta(roots, results)
        if reason is not None:
            for node in reversed(added):
                self.graph.erase_node(node)
            self.miss(op, roots[0], reason)
            return None
        self._commit(roots, results, interior, added)
        self.raised.append(Raised(op, call, Site(op.name, spelling.module_path(call), note)))
        return self.raised[-1]

    def _results(
        self,
        call: Node,
        count: int,
        added: list[Node],
        anchor: Node,
        adapt: Callable[[torch.fx.Graph, Node], Sequence[Node]] | None,
    ) -> list[Node]:
        if adapt is None and count == 1:
            return [call]
        before = set(self.graph.nodes)
        with self.graph.inserting_before(anchor):
            if adapt is not None:
                results = list(adapt(self.graph, call))
            else:
                results = [self.graph.call_function(operator.getitem, (call, i)) for i in range(count)]
        fresh = [n for n in self.graph.nodes if n not in before]
        for node in fresh:
            self.writes.place(node, anchor)
        added += fresh
        return results

    def _unsafe(self, roots: Sequence[Node], interior: Sequence[Node], args: tuple[Any, ...]) -> str | None:
        inside = set(interior)
        for node in interior:
            if node in roots:
                continue
            outside = [u for u in node.users if u not in inside]
            if outside:
                return f"{node.name} is also used by {outside[0].name}"
        order = self.writes.order
        first = min(order[n] for n in interior)
        last = max(order[n] for n in roots)
        ids = frozenset().union(*(storage_ids(a) for a in _nodes(args)), *(storage_ids(n) for n in interior))
        for node in self.writes.between(first - 1, last + 1, ids):
            if node not in inside:
                return f"{node.name} writes to memory that it reads"
        return None

    def _insertion_point(self, roots: Sequence[Node], args: tuple[Any, ...]) -> Node | None:
        """The first root, or the node after the last argument if that comes later; None if a result is used before."""
        order = self.writes.order
        first_root = min(roots, key=order.__getitem__)
        latest = max(_nodes(args), key=order.__getitem__, default=first_root)
        if order[latest] < order[first_root]:
            return first_root
        used = min((order[u] for root in roots for u in root.users), default=order[latest] + 1)
        return latest.next if order[latest] < used else None

    def _propagate(self, op: Op, added: Sequence[Node]) -> str | None:
        """Run the new nodes on fake tensors and store what they give; the text of an error is a reason to decline."""
        for node in added:
            fake_args = torch.fx.map_arg(node.args, spelling.fake)
            try:
                with torch.no_grad(), fake_mode([*fake_args, *_first(fake_args)]):
                    if node.target is op.default:
                        value = self._results_of(op, fake_args)
                    elif node.op == "call_method":
                        value = getattr(fake_args[0], str(node.target))(*fake_args[1:])
                    else:
                        value = node.target(*fake_args)  # type: ignore[operator]
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                return f"{op.name} does not take these arguments: {error}"
            node.meta["example_value"] = value
        return None

    def _results_of(self, op: Op, fake_args: tuple[Any, ...]) -> Any:
        """What the op gives for these fake arguments: found out once for all layers, which differ in nothing."""
        key = (op.name, spelling.metadata(fake_args))
        if key not in self._layouts:
            value = op.default(*fake_args)
            several = isinstance(value, (tuple, list))
            self._layouts[key] = several, [spelling.layout(t) for t in (value if several else (value,))]
            return value
        several, layouts = self._layouts[key]
        fresh = tuple(
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype, device in layouts
        )
        return fresh if several else fresh[0]

    def _commit(
        self, roots: Sequence[Node], results: Sequence[Node], interior: Sequence[Node], added: Sequence[Node]
    ) -> None:
        for node in added:
            for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
                if key in roots[0].meta:
                    node.meta[key] = roots[0].meta[key]
        for root, result in zip(roots, results, strict=True):
            root.replace_all_uses_with(result)
        for node in sorted(interior, key=self.writes.order.__getitem__, reverse=True):
            if not node.users:
                self.graph.erase_node(node)

    def sweep(self, candidates: Sequence[Any]) -> None:
        """Erase pure nodes that nobody uses any more, from `candidates` upwards."""
        pending = [n for n in candidates if isinstance(n, Node)]
        while pending:
            node = pending.pop()
            if node._erased or node.users or not spelling.is_pure(node):
                continue
            inputs = list(node.all_input_nodes)
            self.graph.erase_node(node)
            pending += inputs


def _nodes(args: tuple[Any, ...]) -> list[Node]:
    return [a for a in args if isinstance(a, Node)]


def _first(args: Sequence[Any]) -> Sequence[Any]:
    return args[0] if args and isinstance(args[0], (tuple, list)) else ()


def fake_mode(values: Any) -> AbstractContextManager[Any]:
    """The fake mode that Dynamo's values were made in, so that tensors an op makes on the way are fake too.

    The mode of the tracing context is no help: Dynamo puts a fresh one there before it calls the backend.
    """
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return nullcontext()


def differs_in_meta(roots: Sequence[Node], results: Sequence[Node]) -> str | None:
    """Why the results do not look exactly like the roots (shape, dtype, stride), or None. Adds no shape guards."""
    for root, result in zip(roots, results, strict=True):
        old, new = spelling.fake(root), spelling.fake(result)
        if old.dtype != new.dtype:
            return f"dtype {new.dtype} for {old.dtype}"
        for what, a, b in (("shape", old.shape, new.shape), ("stride", old.stride(), new.stride())):
            if len(a) != len(b) or not all(_same(x, y, i, old) for i, (x, y) in enumerate(zip(a, b, strict=True))):
                return f"{what} {tuple(b)} for {tuple(a)}"
    return None


def _same(x: Any, y: Any, dim: int, old: torch.Tensor) -> bool:
    # The stride of a dimension of size one says nothing.
    return statically_known_true(x == y) or statically_known_true(old.shape[dim] == 1)
