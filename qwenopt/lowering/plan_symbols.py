"""symbolic sizes of Dynamo's fake tensors  ->  numbers that a plan reads off its inputs"""

from __future__ import annotations

from typing import Any

from torch import SymInt
from torch.fx import Node

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
