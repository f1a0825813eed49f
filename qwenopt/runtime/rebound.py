"""Rebound: a call of a compiled function, again on other tensors in the place of some, of other sizes too.

Dynamo traces a decode step of 28 layers for seconds, and a graph that takes any number of tokens is there already when
it comes to that: the one that read the prompt. Under the direct lowering such a function holds no size but those that
never change; all others are read off its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor
from torch.fx import GraphModule


@dataclass(frozen=True)
class Call:
    """What a function was called with, and what Dynamo knew of it: fake tensors and symbols for the numbers."""

    args: tuple[Any, ...]
    known: tuple[Any, ...]

    def with_instead(self, others: Mapping[int, Tensor]) -> tuple[Any, ...] | None:
        """The arguments with `others`, by the id of what they stand for; None where a size is not the graph's to vary.

        Numbers among the arguments, which are sizes or offsets, follow the tensors.
        """
        args = [others.get(id(a), a) for a in self.args]
        numbers: list[tuple[int, Any]] = []  # of the tensors: what it is, what Dynamo called it
        for arg, known in zip(args, self.known, strict=True):
            if isinstance(arg, Tensor):
                if not isinstance(known, Tensor) or arg.dim() != known.dim():
                    return None
                numbers += zip(_numbers(arg), _numbers(known), strict=True)
        values: dict[Any, int] = {}
        for number, known in numbers:
            if isinstance(known, SymInt) and known.node.expr.is_Symbol:
                values.setdefault(known.node.expr, number)
        if any(_value(known, values) != number for number, known in numbers):
            return None
        found = [arg if isinstance(arg, Tensor) else _value(k, values) for arg, k in zip(args, self.known, strict=True)]
        return None if None in [f for f in found if not isinstance(f, Tensor)] else tuple(found)


def _numbers(t: Tensor) -> list[Any]:
    """Its sizes and its offset. Strides may be what they like: the nodes of a graph ask the tensors for theirs."""
    return [*t.shape, t.storage_offset()]


def _value(known: Any, values: Mapping[Any, int]) -> Any:
    """A number that Dynamo knows by symbols, from theirs; None where one of them is not known."""
    if not isinstance(known, SymInt):
        return known
    value = known.node.expr.xreplace(values)
    return None if getattr(value, "free_symbols", ()) else int(value)


def known_inputs(gm: GraphModule) -> tuple[Any, ...]:
    """What Dynamo knows of each input of its graph."""
    return tuple(node.meta.get("example_value") for node in gm.graph.nodes if node.op == "placeholder")
