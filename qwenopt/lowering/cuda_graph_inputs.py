"""How the inputs of a graph reach a captured call: where they lie, as copies, or as part of the key."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwenopt.graphs import spelling, storage


@dataclass(frozen=True)
class Inputs:
    """The places of a graph's inputs by how a captured call gets them.

    kept: tensors that are used where they lie, so that their addresses are part of the key: parameters, buffers, what
    `mark_static_address` names (pools of a cache, its table and lengths, the state of thinking) and whatever the graph
    writes to. copied: other tensors of the device, copied before each replay. host: single numbers on the CPU and
    symbols of sizes, which a graph would hold as they were when it was captured: their values are part of the key.
    open: tensors whose shape is not compiled in. written: those of `kept` that are written to.
    """

    kept: tuple[int, ...]
    copied: tuple[int, ...]
    host: tuple[int, ...]
    open: tuple[int, ...]
    written: tuple[int, ...]

    @classmethod
    def of(cls, gm: GraphModule, inputs: Sequence[Any], device: torch.device) -> Inputs:
        """Sort the inputs of a graph whose raised nodes are not bound yet: a kernel does not say what it writes."""
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        memory = _written_memory(gm.graph.nodes)
        tensors = [i for i, a in enumerate(inputs) if isinstance(a, Tensor) and a.device == device]
        written = {i for i in tensors if storage.storage_ids(nodes[i]) & memory}
        kept = {i for i in tensors if i in written or _is_static(inputs[i])}
        return cls(
            kept=tuple(sorted(kept)),
            copied=tuple(i for i in tensors if i not in kept),
            host=tuple(i for i in range(len(inputs)) if i not in tensors),
            open=tuple(i for i in tensors if i not in kept or _is_open(nodes[i])),
            written=tuple(sorted(written)),
        )

    def key(self, args: Sequence[Any]) -> Hashable:
        """What must be the same for a captured call to serve another one."""
        return (
            tuple([args[i].data_ptr() for i in self.kept]),
            tuple([(args[i].shape, args[i].stride()) for i in self.open]),
            tuple([_value(args[i]) for i in self.host]),
        )

    def written_memory(self, args: Sequence[Any]) -> frozenset[int]:
        """Where the storages that the call writes to begin."""
        return frozenset(storage_begin(args[i]) for i in self.written)

    def overlap(self, args: Sequence[Any], memory: frozenset[int]) -> bool:
        """Whether a tensor to be copied lies in memory that the call writes to: its copy would miss the writes."""
        return bool(memory) and any(storage_begin(args[i]) in memory for i in self.copied)


def _written_memory(nodes: Iterable[Node]) -> frozenset[int]:
    ids = [storage.storage_ids(n) for node in nodes for n in storage.written_nodes(node)]
    return frozenset().union(*ids)


def _is_static(t: Tensor) -> bool:
    # Dynamo marks the parameters and buffers of modules just as `mark_static_address` marks what a cache holds.
    return isinstance(t, torch.nn.Parameter) or getattr(t, "_dynamo_static_input_type", None) is not None


def _is_open(node: Node) -> bool:
    fake = spelling.fake(node)
    return not isinstance(fake, Tensor) or not all(isinstance(n, int) for n in (*fake.shape, *fake.stride()))


def _value(value: Any) -> Hashable:
    return (value.dtype, value.item()) if isinstance(value, Tensor) else value


def storage_begin(t: Tensor) -> int:
    """Where the memory that a tensor lies in begins."""
    return t.untyped_storage().data_ptr()
