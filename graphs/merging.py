"""The state of merging one graph: puts one op in place of several raised ones, if a kernel has it and it is safe."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Raised
from qwenopt.graphs.storage import Writes, storage_ids, written_nodes
from qwenopt.ops import Op
from qwenopt.report import Site


@dataclass
class Merging:
    """Merges of one graph; `raised` is what is raised at present. The providers of all of it have been chosen."""

    gm: GraphModule
    raised: list[Raised]

    def __post_init__(self) -> None:
        self._writes = Writes(self.gm.graph)
        self._by_node = {r.node: r for r in self.raised}

    def of(self, op: Op) -> Iterator[Raised]:
        """What is raised as `op`, as long as it is."""
        for r in list(self.raised):
            if r.op is op and r.node in self._by_node:
                yield r

    def raised_as(self, op: Op, node: Any) -> Raised | None:
        """What is raised at a node, if that is `op`."""
        found = self._by_node.get(node) if isinstance(node, Node) else None
        return found if found is not None and found.op is op else None

    def replace(
        self,
        op: Op,
        parts: Sequence[Raised],
        args: tuple[Any, ...],
        results: Mapping[Node, int | None],
        *,
        at: Node,
        others: Sequence[Node] = (),
    ) -> bool:
        """Put `op(*args)` in the place of `at`, and erase the parts and the `others` that go with them; whether it did.

        `at` is one of them. `results` names the nodes, parts or items of parts, that are used elsewhere, and what
        replaces each: an item of what the op returns, or (None) all of it. Nothing is done where no kernel takes these
        arguments or where it would not be the same: an argument is computed after `at`, a result used before it or
        another one anywhere, or a part would move past something that writes to memory which it reads, or touches
        memory which it writes to.
        """
        provider = op.choose(map_arg(args, spelling.fake)).provider
        interior = [*others, *(node for part in parts for node in (part.node, *items(part.node).values()))]
        if provider is None or not self._is_safe(interior, args, results, at):
            return False
        graph = self.gm.graph
        with graph.inserting_before(at):
            call = graph.call_function(op.default, args)
            self._writes.place(call, at)
            for node, index in results.items():
                result = call
                if index is not None:
                    result = graph.call_function(operator.getitem, (call, index))
                    self._writes.place(result, at)
                result.meta = dict(node.meta)
                node.replace_all_uses_with(result)
        for node in sorted(interior, key=self._writes.order.__getitem__, reverse=True):
            graph.erase_node(node)
        self._note(Raised(op, call, Site(op.name, spelling.module_path(at)), provider), parts)
        return True

    def _is_safe(
        self, interior: Sequence[Node], args: tuple[Any, ...], results: Mapping[Node, int | None], at: Node
    ) -> bool:
        order, inside = self._writes.order, set(interior)
        needed: list[Node] = []
        map_arg(args, needed.append)
        for node in interior:
            outside = [user for user in node.users if user not in inside]
            if any(node not in results or order[user] < order[at] for user in outside):
                return False
            if not self._untouched(node, at, inside):
                return False
        if any(order[node] > order[at] for node in needed):
            return False
        ids = frozenset().union(*(storage_ids(node) for node in (*needed, *interior)))
        first, last = min(map(order.__getitem__, interior)), max(map(order.__getitem__, interior))
        return all(node in inside for node in self._writes.between(first, last, ids))

    def position(self, node: Node) -> float:
        """Where in the graph a node is."""
        return self._writes.order[node]

    def move_behind(self, node: Node, anchor: Node) -> bool:
        """Move a node that writes, and whose result nobody uses, behind a later one; whether that is the same."""
        if node.users or not self._untouched(node, anchor, {node}):
            return False
        following = anchor.next
        anchor.append(node)
        self._writes.place(node, following)
        return True

    def _untouched(self, node: Node, until: Node, inside: Collection[Node]) -> bool:
        """Whether nothing else between a node and a later one, that included, touches what the node writes to."""
        written = frozenset().union(*(storage_ids(n) for n in written_nodes(node)))
        if not written:
            return True
        other, end = node.next, until.next
        while other is not end:
            if other.op == "root":
                return False  # `until` is not later
            if other not in inside and any(storage_ids(n) & written for n in other.all_input_nodes):
                return False
            other = other.next
        return True

    def _note(self, merged: Raised, parts: Sequence[Raised]) -> None:
        assert merged.provider is not None
        for part in parts:
            part.site.provider, part.site.fallback = merged.provider.name, ""
            part.site.merged = merged.op.name
            del self._by_node[part.node]
        self._by_node[merged.node] = merged
        self.raised = [*(r for r in self.raised if r.node in self._by_node), merged]


def items(node: Node) -> dict[int, Node]:
    """The nodes that take the results of a node apart, by index."""
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}  # type: ignore[misc]


def is_advance(node: Node) -> bool:
    """Whether a node counts a number on by as many as the graph says, `length.add_(n)`, and its result is not used."""
    if node.op != "call_method" or node.target != "add_" or len(node.args) != 2 or node.kwargs or node.users:
        return False
    x = spelling.fake(node.args[0])
    return isinstance(node.args[1], int) and x.dtype == torch.int64 and x.dim() == 0
