"""symbolic sizes of Dynamo's fake tensors  ->  numbers that a plan reads off its inputs, or has been recorded for"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from qwenopt.graphs import spelling
from qwenopt.ops.steps import NotPlanned, Number, Size


class Symbols:
    """The symbols met so far: for each, the input and the dimension whose size it is."""

    def __init__(self) -> None:
        self.places: list[tuple[Node, int]] = []
        self._index: dict[Any, int] = {}

    def number(self, value: Any, node: Node | None = None, dim: int = 0) -> Number:
        """`value` as an int, or as what it is at run time. A bare symbol is learnt as dimension `dim` of `node`."""
        if isinstance(value, int):
            return value
        if not isinstance(value, SymInt):
            raise NotPlanned(f"a size of type {type(value).__name__}")
        expr = value.node.expr
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


class Fixed:
    """The same for a plan of one size: every symbol has a value."""

    def __init__(self, values: Mapping[Any, int]) -> None:
        self.places: list[tuple[Node, int]] = []
        self._values, self._known = dict(values), dict[Any, int]()

    def number(self, value: Any, node: Node | None = None, dim: int = 0) -> Number:
        """`value` as an int."""
        if isinstance(value, int):
            return value
        if not isinstance(value, SymInt):
            raise NotPlanned(f"a size of type {type(value).__name__}")
        expr = value.node.expr
        if expr not in self._known:  # a graph has hundreds of sizes, but few that differ
            found = expr.subs(self._values)
            if not found.is_Integer:
                raise NotPlanned(f"a size that the inputs do not tell: {expr}")
            self._known[expr] = int(found)
        return self._known[expr]


def is_size(value: Any) -> bool:
    """Whether a node with this fake value computes a size or several."""
    return isinstance(value, int | SymInt | torch.Size)


def places(nodes: Iterable[Node]) -> dict[Any, tuple[int, int | None]]:
    """Each symbol of the inputs `nodes`: which of them tells its value, and in which dimension (None: is it itself)."""
    found: dict[Any, tuple[int, int | None]] = {}
    for i, node in enumerate(nodes):
        fake = spelling.fake(node)
        sizes: list[tuple[Any, int | None]] = [(fake, None)]
        if isinstance(fake, Tensor):
            sizes = [(size, dim) for dim, size in enumerate(fake.shape)]
        for size, dim in sizes:
            if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, (i, dim))
    return found


def hints(nodes: Sequence[Node]) -> dict[Any, int]:
    """The values with which Dynamo traced the symbols of these inputs; none if one of them had no value."""
    values = {}
    for symbol, (i, dim) in places(nodes).items():
        fake = spelling.fake(nodes[i])
        node = (fake if dim is None else fake.shape[dim]).node
        if not node.has_hint():  # what an op returned that looks at data
            return {}
        values[symbol] = int(node.hint)
    return values
