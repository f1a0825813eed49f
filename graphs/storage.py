"""Storage facts of a Dynamo graph: which nodes share memory, and which nodes write to it.

Dynamo's graph is not functional. A rewrite that moves a read past a write, or drops a node that others see through an
alias, would be silently wrong, so every replacement asks here first.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from qwenopt.graphs import spelling

_INPLACE_NAMES = ("add", "and", "concat", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub",
                  "truediv", "xor")  # fmt: skip
_INPLACE_OPERATORS = frozenset(getattr(operator, f"i{name}") for name in _INPLACE_NAMES)
_INPLACE_METHODS = frozenset({"__setitem__", *(f"__i{name}__" for name in _INPLACE_NAMES)})


def storage_ids(node: Any) -> frozenset[int]:
    """Identities of the fake storages behind a node's value (several for a tuple, none for a number)."""
    value = spelling.fake(node)
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return frozenset(_storage_id(t) for t in tensors if isinstance(t, torch.Tensor))


def _storage_id(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def written_nodes(node: Node) -> list[Node]:
    """The argument nodes whose memory this node writes; empty for a functional node."""
    if node.op == "call_method":
        name = str(node.target)
        inplace = name in _INPLACE_METHODS or _ends_like_inplace(name)
        return _nodes(node.args[:1]) if inplace else []
    if node.op != "call_function":
        return []
    written = _nodes(node.kwargs.get("out"))
    if isinstance(node.target, torch._ops.OpOverload):
        return written + _schema_writes(node, node.target)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        # Which overload runs is decided at the call; take the union of what any of them may write.
        for name in node.target.overloads():
            written += _schema_writes(node, getattr(node.target, name))
        return written
    if getattr(node.target, "__module__", "") == operator.add.__module__:  # `and_` and `or_` write nothing
        inplace = node.target is operator.setitem or node.target in _INPLACE_OPERATORS
    else:
        inplace = _asks_inplace(node) or _ends_like_inplace(getattr(node.target, "__name__", ""))
    if inplace:
        written += _nodes(node.args[:1]) or _nodes(list(node.kwargs.values())[:1])
    return written


def _nodes(value: Any) -> list[Node]:
    """All nodes in a value, which may be a node, a list of nodes, or anything else."""
    if isinstance(value, Node):
        return [value]
    return [n for item in value for n in _nodes(item)] if isinstance(value, (list, tuple)) else []


def _asks_inplace(node: Node) -> bool:
    """Whether the call sets a parameter `inplace`, by name or by position."""
    given = node.kwargs.get("inplace")
    if given is None:
        given = next((a for p, a in zip(_parameters(node.target), node.args, strict=False) if p == "inplace"), False)
    return given is not False


@functools.cache
def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built in, without a signature
        return ()


def _schema_writes(node: Node, overload: torch._ops.OpOverload) -> list[Node]:
    written = []
    for i, arg in enumerate(overload._schema.arguments):
        if arg.alias_info is None or not arg.alias_info.is_write:
            continue
        value = node.kwargs.get(arg.name, node.args[i] if i < len(node.args) else None)
        written += _nodes(value)
    return written


def _ends_like_inplace(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


class Writes:
    """Every write of a graph in program order, by storage."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.order = {node: float(i) for i, node in enumerate(graph.nodes)}
        self.order[graph._root] = float(len(graph.nodes))  # what follows the last node
        self._writes: list[tuple[Node, frozenset[int]]] = []
        for node in graph.nodes:
            ids: frozenset[int] = frozenset().union(*(storage_ids(n) for n in written_nodes(node)))
            if ids:
                self._writes.append((node, ids))

    def place(self, node: Node, anchor: Node) -> None:
        """Give a new node a position between its predecessor and `anchor`, so that the order stays a dictionary."""
        self.order[node] = (self.order.get(node.prev, -1.0) + self.order[anchor]) / 2

    def between(self, first: float, last: float, ids: frozenset[int]) -> Iterator[Node]:
        """Nodes after position `first` and before position `last` that write one of the storages."""
        for node, written in self._writes:
            if first < self.order[node] < last and written & ids:
                yield node
