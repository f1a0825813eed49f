"""symbolic sizes of Dynamo's fake tensors  ->  numbers that a plan reads off its inputs, or has been recorded for"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.ops.steps import NotPlanned, Number, Size


class Symbols:
    """The symbols met so far: for each, the input and the dimension whose size it is. Those in `values` are no more."""

    def __init__(self, values: Mapping[Any, int] | None = None) -> None:
        self.places: list[tuple[Node, int]] = []
        self._index: dict[Any, int] = {}
        self._values, self._known = dict(values or {}), dict[Any, Any]()

    def number(self, value: Any, node: Node | None = None, dim: int = 0) -> Number:
        """`value` as an int, or as what it is at run time. A bare symbol is learnt as dimension `dim` of `node`."""
        if isinstance(value, int):
            return value
        if not isinstance(value, SymInt):
            raise NotPlanned(f"a size of type {type(value).__name__}")
        expr = self._filled(value.node.expr)
        if expr.is_Integer:
            return int(expr)
        symbols = list(expr.free_symbols)
        if len(symbols) != 1:
            raise NotPlanned(f"a size of several symbols: {expr}")
        (symbol,) = symbols
        if expr == symbol and symbol not in self._index and node is not None:
            self._index[symbol] = len(self.places)
            self.places.append((node, dim))
        scale = expr.coeff(symbol)
        offset = expr - scale * symbol
        if symbol not in self._index or not (scale.is_Integer and offset.is_Integer):
            raise NotPlanned(f"a size that is not a multiple of a dimension: {expr}")
        return Size(self._index[symbol], int(scale), int(offset))

    def _filled(self, expr: Any) -> Any:
        if not self._values:
            return expr
        if expr not in self._known:  # a graph has hundreds of sizes, but few that differ
            self._known[expr] = expr.subs(self._values)
        return self._known[expr]


def is_size(value: Any) -> bool:
    """Whether a node with this fake value computes a size or several."""
    return isinstance(value, int | SymInt | torch.Size)


def _sizes(node: Node) -> list[tuple[Any, int | None]]:
    """The sizes that a node tells, each with its dimension (None: the node is that size itself)."""
    fake = spelling.fake(node)
    if isinstance(fake, Tensor):
        return [(size, dim) for dim, size in enumerate(fake.shape)]
    return [(fake, None)]


def _is_part(node: Node) -> bool:
    """Whether it is a part of an input: nothing is computed."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and source.op == "placeholder"


def computed(nodes: Iterable[Node]) -> set[Any]:
    """The symbols in the sizes of what these nodes compute. Others are of inputs alone, such as the pages of a pool."""
    sizes = [size for node in nodes if not _is_part(node) for size, _ in _sizes(node) if isinstance(size, SymInt)]
    return {symbol for size in sizes for symbol in size.node.expr.free_symbols}


def places(inputs: Iterable[Node], symbols: set[Any]) -> dict[Any, tuple[int, int | None]]:
    """Which of the inputs tells the value of each of `symbols`, and in which dimension (None: it is that itself)."""
    found: dict[Any, tuple[int, int | None]] = {}
    for i, node in enumerate(inputs):
        for size, dim in _sizes(node):
            if isinstance(size, SymInt) and size.node.expr in symbols:
                found.setdefault(size.node.expr, (i, dim))
    return found


def hints(inputs: Iterable[Node], symbols: set[Any]) -> dict[Any, int]:
    """The values with which Dynamo traced `symbols`; none at all if the inputs do not tell each of them."""
    values: dict[Any, int] = {}
    for node in inputs:
        for size, _ in _sizes(node):
            if isinstance(size, SymInt) and size.node.expr in symbols and size.node.has_hint():
                values.setdefault(size.node.expr, int(size.node.hint))
    return values if values.keys() == symbols else {}
