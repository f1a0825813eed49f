"""One layer of a paged cache as transformers sees it: new keys in, all keys out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from qwenopt.errors import QwenoptError
from qwenopt.ops import KV_APPEND, KV_GATHER, KV_RESERVE


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of a call go, in static tensors: what all layers of a cache share.

    block_table int32 [rows, M]; slots int64, one for each token; the cache's handle for `qwenopt::kv_reserve`; length
    int64 [], the tokens of each row so far.
    """

    block_table: Tensor
    slots: Tensor
    handle: Tensor
    length: Tensor


class LayeredCache(Cache):
    """A cache whose layers are all there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Give a layer its new keys and values; raises QwenoptError for a layer that the cache does not have."""
        if layer_idx >= len(self.layers):
            raise QwenoptError(
                f"paged cache: made for num_hidden_layers={len(self.layers)}, called for layer {layer_idx}: it belongs "
                "to another model; reset() it"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class PoolLayer(CacheLayerMixin):
    """What layers over pools share, however they write and read them."""

    is_compileable = True
    supports_early_init = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is lazy: the pools are there from the start."""

    def get_max_cache_shape(self) -> int:
        """The most tokens that a row can have, by the name that transformers has for it up to 5.12."""
        return int(self.get_max_length())


class PagedLayer(PoolLayer):
    """One layer's pools, as a batch sees them: keys and values [pages, G, page_size, D], scales where they are int8."""

    keys: Tensor
    values: Tensor
    is_croppable = True

    def __init__(self, pools: Sequence[Tensor | None], places: Places, *, is_first: bool, is_sliding: bool) -> None:
        super().__init__()
        keys, values, self.k_scale, self.v_scale = pools
        assert keys is not None
        assert values is not None
        self.keys, self.values = keys, values
        # Numbers of their own: asking a pool whose number of pages is open for its shape would leave nodes in a graph.
        _, self.groups, self.page_size, self.head_dim = keys.shape
        self.places, self.is_first, self.is_sliding = places, is_first, is_sliding
        self.is_initialized = True

    def check(self, key_states: Tensor) -> None:
        """Raise QwenoptError unless these keys are of the model that the cache was made for."""
        given = tuple(key_states.shape)
        if given[1] != self.groups or given[3] != self.head_dim:
            raise QwenoptError(
                f"paged cache: keys (B, G, S, D) = {given}; the cache was made for G = {self.groups}, "
                f"D = {self.head_dim}: it belongs to another model"
            )
        if key_states.device != self.keys.device:
            raise QwenoptError(
                f"paged cache: keys on {key_states.device}, the cache is on {self.keys.device}; make it with "
                f"device={str(key_states.device)!r}"
            )
        if self.keys.dtype not in (key_states.dtype, torch.int8):
            raise QwenoptError(
                f"paged cache: keys of {key_states.dtype}, the cache holds {self.keys.dtype}; make it with "
                f"dtype={key_states.dtype}"
            )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, G, S, D] and return those of all tokens, [B, G, M * page_size, D]."""
        self.check(key_states)
        batch, _, seq, _ = key_states.shape
        places = self.places
        if self.is_first:
            KV_RESERVE.default(places.handle, places.block_table, places.length, places.slots, batch, seq)
        pools = (self.keys, self.values, self.k_scale, self.v_scale)
        KV_APPEND.default(*pools, key_states, value_states, places.slots[: batch * seq])
        keys, values = KV_GATHER.default(*pools, places.block_table[:batch], False, key_states.dtype)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` returns."""
        return self.places.block_table.shape[1] * self.page_size, 0

    def get_seq_length(self) -> Tensor:
        """Tokens of each row so far: a tensor, as transformers' static cache has it, so that graphs can read it."""
        return self.places.length

    def get_max_length(self) -> int:
        """The most tokens that a row can have."""
        return self.places.block_table.shape[1] * self.page_size
