"""PackedBatch: one call's tokens of many rows, one after another, without padding between rows.

A model sees one sequence of T tokens; only attention knows that they belong to rows: tokens `q_starts[r]` to
`q_starts[r + 1]` are the next ones of row r. Every tensor of a batch is made once and written in place before each
call, so that a compiled graph serves them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from qwenopt.errors import QwenoptError
from qwenopt.ops import KV_APPEND, KV_GATHER, PAGED_MASK
from qwenopt.runtime.checks import check_whole
from qwenopt.runtime.mirror import Mirror
from qwenopt.runtime.paged_cache import PagedKVCache, layer_types
from qwenopt.runtime.paged_layer import LayeredCache, PagedLayer, PoolLayer


class PackedPlaces:
    """Where the tokens of a call are and go: what all layers of a packed batch share.

    Static tensors, written in place; `ids`, `positions` and `slots` are those of the present call, views of the first T
    places of what was made for the most tokens.
    """

    def __init__(self, num_rows: int, num_tokens: int, width: int, device: torch.device) -> None:
        self.block_table = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
        self.q_starts = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self.last = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.all_tokens = torch.zeros(3, num_tokens, dtype=torch.int64, device=device)
        self.starts_mirror, self.last_mirror = Mirror(self.q_starts), Mirror(self.last)
        self.tokens_mirror = Mirror(self.all_tokens)
        for t in (self.block_table, self.q_starts, self.last, self.all_tokens):
            torch._dynamo.mark_static_address(t, guard=False)
            torch._dynamo.mark_static(t)  # else a second size seen would make Dynamo take it for one that changes
        self.num_pages = width  # that some row has, at most: no more need be looked at
        self.resize(num_tokens)

    def table(self) -> Tensor:
        """The block table; where no compiler would drop what is gathered by it, only as wide as the rows are long."""
        return self.block_table if torch.compiler.is_compiling() else self.block_table[:, : self.num_pages]

    def tensors(self) -> dict[str, Tensor]:
        """What a call reads of these, by name."""
        names = ("block_table", "q_starts", "last", "ids", "positions", "slots")
        return {name: getattr(self, name) for name in names}

    def resize(self, num_tokens: int, *, dynamic: bool = False) -> None:
        """The next calls are of `num_tokens` tokens; `dynamic`: as one of many numbers that one graph is to serve."""
        self.ids, self.positions, self.slots = (row[:num_tokens] for row in self.all_tokens)
        for t in (self.ids, self.positions, self.slots):
            torch._dynamo.mark_static_address(t, guard=False)  # views of one piece of memory, new ones each time
            if dynamic:
                torch._dynamo.mark_dynamic(t, 0)
            else:
                torch._dynamo.mark_static(t)


# Up to 5.3, transformers numbers the tokens of every call from here, and reads that only where no positions came.
_ASKED_ANYWAY = "cache_position" in inspect.signature(CacheLayerMixin.get_mask_sizes).parameters


class PackedLayer(PoolLayer):
    """One layer's pools, as packed rows see them."""

    def __init__(self, layer: PagedLayer, places: PackedPlaces) -> None:
        super().__init__()
        self.layer, self.places = layer, places
        self.is_sliding = layer.is_sliding
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [1, G, T, D]; return those of all rows one after another."""
        layer = self.layer
        layer.check(key_states)
        pools = (layer.keys, layer.values, layer.k_scale, layer.v_scale)
        KV_APPEND.default(*pools, key_states, value_states, self.places.slots)
        keys, values = KV_GATHER.default(*pools, self.places.table(), True, key_states.dtype)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not asked for: packed rows bring their own masks."""
        raise QwenoptError("packed rows: call the model with attention_mask=batch.masks()")

    def get_seq_length(self) -> int:
        """Not asked for: packed rows bring their own positions."""
        if _ASKED_ANYWAY:
            return 0
        raise QwenoptError("packed rows: call the model with position_ids=batch.places.positions[None]")

    def get_max_length(self) -> int:
        """The most tokens that a row can have."""
        return self.layer.get_max_length()


class PackedBatch(LayeredCache):
    """The cache for calls of at most `num_tokens` tokens of at most `num_rows` rows of `cache`.

    `fill` says which tokens come next; then `model(places.ids[None], position_ids=places.positions[None],
    attention_mask=batch.masks(), past_key_values=batch)` computes them, and `places.last` [num_rows] says where among
    them each row's last token is. Places left over are padding: written nowhere, seen by nobody.

    With `dynamic`, a call is of as many tokens as it is filled with, and one compiled graph serves them all; otherwise
    every call is of `num_tokens`. If these are as many as the rows, the batch is `one_each`: place i is line i's.
    """

    def __init__(self, cache: PagedKVCache, num_rows: int, num_tokens: int, *, dynamic: bool = False) -> None:
        check_whole("PackedBatch", num_rows=num_rows, num_tokens=num_tokens)
        self.cache, self.num_rows, self.num_tokens, self.dynamic = cache, num_rows, num_tokens, dynamic
        self.one_each = not dynamic and num_rows == num_tokens
        self.places = PackedPlaces(num_rows, num_tokens, cache.rows.max_pages, cache.device)
        self._lines: list[tuple[int, ...]] = [()] * num_rows
        self._kinds = tuple(dict.fromkeys(layer_types(cache.config)))
        layers = [PackedLayer(layer, self.places) for layer in cache.layers]
        super().__init__(layers=layers)

    def masks(self) -> Any:
        """What the tokens see, as a model of this config takes it: a mask, or one for each kind of attention."""
        masks = {kind: self._mask(kind) for kind in self._kinds}
        return masks if getattr(self.cache.config, "layer_types", None) else masks[self._kinds[0]]

    def _mask(self, kind: str) -> Tensor:
        window = self.cache.config.sliding_window if kind == "sliding_attention" else 0
        keys = self.places.table().shape[1] * self.cache.page_size
        return PAGED_MASK.default(self.places.q_starts, self.places.positions, keys, window)  # type: ignore[no-any-return]

    def fill(self, tokens: Sequence[tuple[int | None, Sequence[int]]]) -> None:
        """Take room for the next tokens of each row, and write where they go. Raises with nothing changed.

        tokens: for each line of the batch the row and its ids; no row, or no ids, for a line without any. The cache
        counts them as written at once; where the call that was to write them fails, `free` the rows and let the cache
        `forget`.
        """
        tokens = [(row, self._ids(row, ids)) for row, ids in tokens]
        rows, count = self.cache.rows, sum(len(ids) for _, ids in tokens)
        if len(tokens) > self.num_rows or count > self.num_tokens or self._crowded(tokens):
            raise QwenoptError(
                f"packed rows: {count} tokens of {len(tokens)} rows; this batch takes {self.num_tokens} tokens of "
                f"{self.num_rows} rows{', one each' if self.one_each else ''}"
            )
        self.cache.check_opened()
        given = [row for row, _ in tokens if row is not None]
        if len(set(given)) < len(given):
            raise QwenoptError(f"packed rows: rows {given}; a row can be on one line only")
        rows.reserve({row: len(ids) for row, ids in tokens if row is not None})
        starts, slots, positions, flat = [0], list[int](), list[int](), list[int]()
        for line, (row, ids) in enumerate(tokens):
            if row is not None and ids:
                begin = rows[row].length
                slots += rows.slots(row, len(ids))
                positions += range(begin, begin + len(ids))
                flat += ids
                rows.advance(row, len(ids), ids)
                self._write_line(line, rows[row].pages)
            if self.one_each and len(flat) == line:
                for values, padding in ((slots, -1), (positions, -1), (flat, 0)):
                    values.append(padding)
            starts.append(len(flat))
        self.places.num_pages = max([1, *(len(rows[row].pages) for row, _ in tokens if row is not None)])
        self._write(starts, [flat, positions, slots])

    def _ids(self, row: int | None, ids: Sequence[int]) -> list[int]:
        vocab = self.cache.config.vocab_size
        bad = next((i for i in ids if not hasattr(i, "__index__") or not 0 <= i < vocab), None)
        if bad is not None:
            raise QwenoptError(f"packed rows: token {bad!r} for row {row}; need whole numbers from 0 to {vocab - 1}")
        return [int(i) for i in ids]

    def _crowded(self, tokens: Sequence[tuple[int | None, Sequence[int]]]) -> bool:
        return self.one_each and any(len(ids) > 1 for _, ids in tokens)

    def _write(self, starts: list[int], values: list[list[int]]) -> None:
        count = len(values[0])
        if self.dynamic:
            self.places.resize(count, dynamic=True)
        padding = self.places.ids.shape[0] - count
        starts += [starts[-1]] * (self.num_rows + 1 - len(starts))
        self.places.starts_mirror.write(starts)
        self.places.last_mirror.write([max(end - 1, 0) for end in starts[1:]])
        padded = [row + [fill] * padding for row, fill in zip(values, (0, -1, -1), strict=True)]
        self.places.tokens_mirror.write(padded)

    def _write_line(self, line: int, pages: list[int]) -> None:
        """One row's line of the table; only what is not there yet."""
        old = self._lines[line]
        same = len(old) if tuple(pages[: len(old)]) == old else 0
        if len(pages) > same:
            fresh = torch.tensor(pages[same:], dtype=torch.int32)
            self.places.block_table[line, same : len(pages)].copy_(fresh)
        self._lines[line] = tuple(pages)
