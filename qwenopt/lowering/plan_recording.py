"""nodes of a graph  ->  steps of a plan, and the array that each node's value becomes"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from qwenopt.graphs import Raised, spelling
from qwenopt.lowering import plan_nodes, plan_symbols
from qwenopt.ops.steps import Array, Buffer, NotPlanned, Steps

_HEAVY = frozenset({"linear", "moe_experts", "attention", "paged_attention"})


class Recording:
    """Nodes of one run while they are being recorded: the steps, and the array that each node's value has become.

    `sizes` gives symbols a value: the plan is for these sizes alone.
    """

    def __init__(self, ops: Mapping[Node, Raised], threads: int, sizes: Mapping[Any, int] | None = None) -> None:
        self.ops = ops
        self.steps = Steps(threads)
        self.values: dict[Node, Any] = {}
        self.inputs: list[Node] = []
        self.fixed = bool(sizes)
        self.symbols = plan_symbols.Symbols(sizes)

    def add(self, node: Node) -> None:
        """Record `node`; raises NotPlanned where it cannot be, which ends the recording."""
        if self.fixed and plan_symbols.is_size(fake := spelling.fake(node)):
            self.values[node] = self._size(fake)
            return
        args: Any = map_arg(node.args, self._value)
        kwargs: Any = map_arg(node.kwargs, self._value)
        raised = self.ops.get(node)
        if raised is None:
            self.values[node] = plan_nodes.record(self.steps, node, args, kwargs)
        elif raised.provider is None or raised.provider.record is None:
            raise NotPlanned(f"{raised.op.name} has no kernel for plans here")
        else:
            self.values[node] = raised.provider.record(self.steps, *args)

    def _value(self, node: Node) -> Any:
        if node not in self.values:
            if self.fixed and plan_symbols.is_size(fake := spelling.fake(node)):
                return self._size(fake)
            self.values[node] = self._outside(node)
            self.inputs.append(node)
        return self.values[node]

    def _size(self, fake: Any) -> Any:
        if isinstance(fake, torch.Size):
            return tuple(self.symbols.number(size) for size in fake)
        return self.symbols.number(fake)

    def _outside(self, node: Node) -> Array:
        fake = spelling.fake(node)
        if not isinstance(fake, Tensor) or fake.device.type != "cpu" or fake.layout != torch.strided:
            raise NotPlanned(f"{node.name} is not a plain CPU tensor")
        shape = tuple(self.symbols.number(size, node, dim) for dim, size in enumerate(fake.shape))
        strides = tuple(self.symbols.number(stride) for stride in fake.stride())
        return Array(Buffer(), shape, strides, fake.dtype)

    @property
    def num_heavy(self) -> int:
        return sum(step.name in _HEAVY for step in self.steps.steps)
