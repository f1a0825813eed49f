"""Pools of continuous batching: what each layer keeps, as parts of the memory that its layers share.

From transformers 5.18 on all layers' keys and values lie in one tensor. A graph that took them one by one would have
inputs that share memory and are written to; Inductor merges those into one and loses their sizes (torch 2.13: a name
that is not defined in the code it makes). So a graph takes each piece of memory once and makes the parts itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwenopt.errors import QwenoptError

# Of which memory, and its pages from the first to the last (None: to the end): what `memory[first:last]` means.
Part = tuple[int, int, int | None]


@dataclass(frozen=True)
class Pools:
    """The keys and values of each layer, [pages, G, page_size, D], as parts of `memories`, no two of which overlap."""

    memories: tuple[Tensor, ...]
    keys: tuple[Part, ...]
    values: tuple[Part, ...]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.memories[0].shape[2]

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer, where they lie."""
        return self._part(self.keys[layer]), self._part(self.values[layer])

    def _part(self, part: Part) -> Tensor:
        memory, first, last = part
        return self.memories[memory][first:last]


def pools_of(cache: Any, num_layers: int) -> Pools:
    """The pools of a cache of transformers. Raises QwenoptError where they lie as in no release that is known."""
    views = [view for layer in range(num_layers) for view in _views(cache, layer)]
    together: dict[int, list[Tensor]] = {}
    for view in views:
        together.setdefault(view.untyped_storage().data_ptr(), []).append(view)
    memories = [_memory(group) for group in together.values()]
    numbers = {address: i for i, address in enumerate(together)}
    parts = [_part(numbers[v.untyped_storage().data_ptr()], memories, v) for v in views]
    return Pools(tuple(memories), tuple(parts[::2]), tuple(parts[1::2]))


def _views(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """The keys and values of one layer as [pages, G, page_size, D], where they lie."""
    if hasattr(cache, "layer_to_allocator"):
        pools = cache.layer_to_allocator[layer].get_cache_for_block_table(layer)
    elif hasattr(cache, "layer_index_to_group_indices"):
        index = cache.layer_index_to_group_indices[layer][1]
        flat = (cache.key_cache[index], cache.value_cache[index])
        pools = tuple(x.view(-1, cache.block_size, *x.shape[1:]) for x in flat)
    else:
        raise unknown(f"a cache {type(cache).__name__} without layer_to_allocator")
    k, v = (x.transpose(1, 2) for x in pools)
    return k, v


def _memory(views: Sequence[Tensor]) -> Tensor:
    """All pages of the storage of these views, from the first of any to the last: a tensor of its own, not a view."""
    start, like = min(v.storage_offset() for v in views), views[0]
    step = like.stride(0)
    for v in views:
        if (v.stride(), v.shape[1:]) != (like.stride(), like.shape[1:]) or (v.storage_offset() - start) % step:
            raise unknown(f"pools of shapes {tuple(like.shape)} and {tuple(v.shape)} in one memory")
    pages = max((v.storage_offset() - start) // step + v.shape[0] for v in views)
    memory = torch.empty(0, dtype=like.dtype, device=like.device)
    return memory.set_(like.untyped_storage(), start, (pages, *like.shape[1:]), like.stride())


def _part(number: int, memories: Sequence[Tensor], view: Tensor) -> Part:
    memory = memories[number]
    first = (view.storage_offset() - memory.storage_offset()) // memory.stride(0)
    behind = memory.shape[0] - first - view.shape[0]
    return number, first, -behind or None


def unknown(what: str) -> QwenoptError:
    """The error for what no release passes that is known."""
    from transformers import __version__

    return QwenoptError(
        f"use_continuous_batching: transformers {__version__} passes {what}, which this version of qwenopt does not "
        "know; install a release that it supports, or leave use_continuous_batching off"
    )
