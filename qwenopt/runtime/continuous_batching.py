"""Hugging Face continuous batching on our kernels: `with use_continuous_batching(model): model.generate_batch(...)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qwenopt.errors import QwenoptError
from qwenopt.ops import KV_APPEND, PAGED_ATTENTION

NAME = "qwenopt_paged|flash"
_KEPT = ("input_ids", "position_ids", "use_cache", "logits_to_keep")


@dataclass(frozen=True)
class PagedStep:
    k_pools: tuple[Tensor, ...]
    v_pools: tuple[Tensor, ...]
    slots: Tensor
    block_table: Tensor
    q_starts: Tensor
    q_positions: Tensor


def paged_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    qwenopt_step: PagedStep | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    step = qwenopt_step
    if step is None:
        raise QwenoptError("x")
    k_pool, v_pool = step.k_pools[module.layer_idx], step.v_pools[module.layer_idx]
    written = (k_pool, v_pool, None, None, key, value, step.slots)
    read = (query, k_pool, v_pool, None, None, step.block_table, step.q_starts, step.q_positions, None, 0, scaling)
    if torch.compiler.is_compiling():
        KV_APPEND.default(*written)
        out = PAGED_ATTENTION.default(*read)
    else:
        KV_APPEND(*written)
        out = PAGED_ATTENTION(*read)
    return out.transpose(1, 2), None


def _pools(cache: Any, num_layers: int):
    k_pools, v_pools = [], []
    for layer in range(num_layers):
        if hasattr(cache, "layer_to_allocator"):
            k, v = cache.layer_to_allocator[layer].get_cache_for_block_table(layer)
        else:
            index = cache.layer_index_to_group_indices[layer][1]
            k, v = (p[index].view(-1, cache.block_size, *p[index].shape[1:]) for p in (cache.key_cache, cache.value_cache))
        k_pools.append(k.transpose(1, 2))
        v_pools.append(v.transpose(1, 2))
    return tuple(k_pools), tuple(v_pools)


def _only(value: Any) -> Any:
    return next(iter(value.values())) if isinstance(value, Mapping) else value


class ContinuousBatching:
    def __init__(self, model):
        self._model = model
        self._pools = WeakKeyDictionary()
        self._before = model.config._attn_implementation
        self._hook = model.register_forward_pre_hook(self._prepare, with_kwargs=True)
        model.config._attn_implementation = NAME

    def remove(self):
        self._hook.remove()
        if self._model.config._attn_implementation == NAME:
            self._model.config._attn_implementation = self._before

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.remove()

    def _prepare(self, model, args, kwargs):
        kept = {name: kwargs[name] for name in _KEPT if name in kwargs}
        return args, kept | {"qwenopt_step": self._step(kwargs)}

    def _step(self, kwargs):
        cache = kwargs["cache"]
        if cache not in self._pools:
            self._pools[cache] = _pools(cache, self._model.config.num_hidden_layers)
        k_pools, v_pools = self._pools[cache]
        (write,), (read,) = kwargs["write_index"], kwargs["read_index"]
        q_starts, k_starts = kwargs["cu_seq_lens_q"], _only(kwargs["cu_seq_lens_k"])
        page_size = k_pools[0].shape[2]
        longest = _only(kwargs.get("max_length_k", kwargs.get("max_seqlen_k")))
        index, starts = (read, k_starts) if read.numel() else (write, q_starts)
        pages = torch.arange(0, longest, page_size, device=index.device)
        places = (starts[:-1, None] + pages).clamp(max=index.numel() - 1)
        table = (index[places] // page_size).to(torch.int32)
        return PagedStep(k_pools, v_pools, write.to(torch.int64), table, q_starts.to(torch.int32), kwargs["position_ids"][0].to(torch.int64))


def use_continuous_batching(model):
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention_forward)
    return ContinuousBatching(model)
