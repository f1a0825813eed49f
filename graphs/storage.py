"""Storage facts of a Dynamo graph: which nodes share memory, and which nodes write to it.

Dynamo's graph is not functional. A rewrite that moves a read past a write, or drops a node that others see through an
alias, would be silently wrong, so every replacement asks here first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from qwenopt.graphs import spelling

_INPLACE_OPERATORS = {getattr(operator, n) for n in dir(operator) if n.startswith("i") and n[1:] in dir(operator)} - {
    operator.index if hasattr(operator, "index") else None
}


def storage_ids(node: Any) -> frozenset[int]:
    """Identities of the fake storages behind a node's value (several for a tuple, none for a number)."""
    value = spelling.fake(node)
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return frozenset(_storage_id(t) for t in tensors if isinstance(t, torch.Tensor))


def _storage_id(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def written_nodes(node: Node) -> list[Node]:
    """The argument nodes whose memory this node writes; empty for a pure or unknown-but-functional node."""
    if node.op == "call_method":
        name = str(node.target)
        inplace = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        return [a for a in node.args[:1] if isinstance(a, Node)] if inplace else []
    if node.op != "call_function":
        return []
    written = [node.kwargs["out"]] if isinstance(node.kwargs.get("out"), Node) else []
    if node.target is operator.setitem or node.target in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True:
        written += [a for a in node.args[:1] if isinstance(a, Node)]
    elif isinstance(node.target, torch._ops.OpOverload):
        written += _schema_writes(node, node.target)
    elif isinstance(node.target, torch._ops.OpOverloadPacket):
        # Which overload runs is decided at the call; take the union of what any of them may write.
        for name in node.target.overloads():
            written += _schema_writes(node, getattr(node.target, name))
    elif _ends_like_inplace(node.target):
        written += [a for a in node.args[:1] if isinstance(a, Node)]
    return written


def _schema_writes(node: Node, overload: torch._ops.OpOverload) -> list[Node]:
    written = []
    for i, arg in enumerate(overload._schema.arguments):
        if arg.alias_info is None or not arg.alias_info.is_write:
            continue
        value = node.kwargs.get(arg.name, node.args[i] if i < len(node.args) else None)
        written += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Node)]
    return written


def _ends_like_inplace(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


class Writes:
    """Every write of a graph in program order, by storage."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.order = {node: float(i) for i, node in enumerate(graph.nodes)}
        self.order[graph._root] = float(len(graph.nodes))  # what follows the last node
        self._writes: list[tuple[float, Node, frozenset[int]]] = []
        for node in graph.nodes:
            ids: frozenset[int] = frozenset().union(*(storage_ids(n) for n in written_nodes(node)))
            if ids:
                self._writes.append((self.order[node], node, ids))

    def between(self, first: float, last: float, ids: frozenset[int]) -> Iterator[Node]:
        """Nodes after position `first` and before position `last` that write one of the storages."""
        for position, node, written in self._writes:
            if first < position < last and written & ids:
                yield node
