"""The state of merging one graph: puts one op in place of several raised ones, if a kernel has it and it is safe."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        at: Raised,
    ) -> bool:
        """Put `op(*args)` in the place of `at`, one of the parts, and erase the parts; whether that was done.

        `results` names the nodes, parts or items of parts, that others use, and what replaces each: an item of what the
        op returns, or (None) all of it. Nothing is done where no kernel takes these arguments or where it would not be
        the same: an argument is computed after `at`, a result used before it or another one anywhere, or a part would
        move past something that writes to memory which it reads.
        """
        provider = op.choose(map_arg(args, spelling.fake)).provider
        interior = [node for part in parts for node in (part.node, *items(part.node).values())]
        if provider is None or not self._is_safe(interior, args, results, at.node):
            return False
        graph = self.gm.graph
        with graph.inserting_before(at.node):
            call = graph.call_function(op.default, args)
            self._writes.place(call, at.node)
            for node, index in results.items():
                result = call
                if index is not None:
                    result = graph.call_function(operator.getitem, (call, index))
                    self._writes.place(result, at.node)
                result.meta = dict(node.meta)
                node.replace_all_uses_with(result)
        for node in sorted(interior, key=self._writes.order.__getitem__, reverse=True):
            graph.erase_node(node)
        self._note(Raised(op, call, Site(op.name, spelling.module_path(at.node)), provider), parts)
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
            if node is not at and written_nodes(node):
                return False
        if any(order[node] > order[at] for node in needed):
            return False
        ids = frozenset().union(*(storage_ids(node) for node in (*needed, *interior)))
        first, last = min(map(order.__getitem__, interior)), max(map(order.__getitem__, interior))
        return all(node in inside for node in self._writes.between(first, last, ids))

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
