"""Hugging Face continuous batching on our kernels: their scheduler and cache, our writes and attention.

    with qwenopt.use_continuous_batching(model):
        outputs = model.generate_batch(prompts, generation_config)

`generate_batch`, `continuous_batching_context_manager` and `init_continuous_batching` then run as they do otherwise, on
a model as it is or compiled by this backend.

**How.** An attention function is registered with `transformers.AttentionInterface`, and a forward pre-hook turns what
the scheduler passes to the model into what `kv_append` and `paged_attention` take: `write_index` numbers places as
`slots` do, and every page_size-th entry of `read_index` tells a page. The cache is theirs, read and written where it
lies through views [pages, G, page_size, D]. Nothing of transformers is replaced. What a call needs is found by its
name, and what is missing is an error that names it.

**Sliding windows.** The scheduler would keep the last tokens of a window in a ring, in which a chunk of a prompt
overwrites what its own first tokens still look at, so that all is copied out before each step. Instead its config says
"full_attention" of every layer meanwhile: it keeps all tokens, shares equal beginnings, which it does not with rings,
and `paged_attention` reads the window alone.

**What each release of transformers 5 allows.** All pass `cache`, `read_index`, `write_index`, `cu_seq_lens_q`,
`cu_seq_lens_k` and `position_ids` to the model, and build no mask for attention that is not eager or sdpa. Checked, on
a CPU, eager and compiled, with 5.1, 5.2, 5.5, 5.8, 5.10, 5.13 and 5.17 to 5.24:

* 5.0: the manager cannot size its cache on a CPU; it is for GPUs only.
* 5.1 to 5.19: any registered attention whose name holds `paged|`; one tensor for each layer's keys and one for its
  values up to 5.17.
* from 5.20: `paged|eager`, `sdpa`, or a name that holds `flash`; a leading `paged|` is cut off. Hence the odd `NAME`.
  `set_attn_implementation` would look for a library of that name, so it is the config that is set.
* from 5.10: `read_index` is empty when no sequence has a past; from 5.18: one tensor of bytes for all layers.
* none gives a block table to attention other than flash attention on GPUs, so ours is derived; `transformers serve`
  takes names from a fixed list (from 5.5), so `serve` below switches its model after loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.errors import QwenoptError
from qwenopt.ops import KV_APPEND, PAGED_ATTENTION
from qwenopt.runtime.continuous_batching_pools import Pools, pools_of, unknown

NAME = "qwenopt_paged|flash"  # holds `paged|` and `flash`, and begins with neither; see above

_MODEL_TYPES = ("qwen3", "qwen3_moe")
_FULL = "full_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What the scheduler passes and the model itself uses; the rest is for attention, and we hand that over in our own form.
_KEPT = ("input_ids", "position_ids", "use_cache", "logits_to_keep")


@dataclass(frozen=True)
class PagedStep:
    """What one forward pass writes and reads, in all layers, as our ops take it; `num_logits` are waited for."""

    pools: Pools
    slots: Tensor
    block_table: Tensor
    q_starts: Tensor
    q_positions: Tensor
    num_logits: int


def paged_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    qwenopt_step: PagedStep | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function: queries [1, H, T, D], new keys and values [1, G, T, D] -> [1, T, H, D], no weights."""
    step = qwenopt_step
    if step is None:
        raise QwenoptError(
            f"attention {NAME!r} was called outside continuous batching; choose it with "
            "qwenopt.use_continuous_batching(model), not by its name"
        )
    k_pool, v_pool = step.pools.of(module.layer_idx)
    window = sliding_window or 0
    new = (k_pool, v_pool, None, None, key, value, step.slots)
    past = (query, k_pool, v_pool, None, None, step.block_table, step.q_starts, step.q_positions, None, window, scaling)
    if torch.compiler.is_compiling():  # one node each, to which the backend then gives its kernel
        KV_APPEND.default(*new)
        out = PAGED_ATTENTION.default(*past)
    else:
        KV_APPEND(*new)
        out = PAGED_ATTENTION(*past)
    return out.transpose(1, 2), None


class ContinuousBatching:
    """A model switched to our attention for continuous batching, until `remove()` or the end of the `with` block."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._pools: WeakKeyDictionary[Any, Pools] = WeakKeyDictionary()
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(_leave, with_kwargs=True),
        ]
        self._before = _switch(model.config, _wanted(model.config))

    def remove(self) -> None:
        """Give the model back the attention that it had. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        _switch(self._model.config, self._before)
        self._hooks, self._before, self._pools = [], {}, WeakKeyDictionary()

    def __enter__(self) -> ContinuousBatching:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # Not compiled: it looks into objects of transformers, which would become guards of the graph.
    @torch.compiler.disable
    def _enter(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """The call of the scheduler in our form. Raises where it is none, or not as we know it."""
        if kwargs.get("cache") is None:
            raise QwenoptError(
                "the model was called outside continuous batching while use_continuous_batching is on; leave its "
                "`with` block, or call remove() on what it returned, before model(...) and model.generate(...)"
            )
        kept = {name: kwargs[name] for name in _KEPT if name in kwargs}
        step = _step(kwargs, self._pools_of(kwargs["cache"]))
        # Which compiled wrapper a module has is told by no public attribute.
        if getattr(model, "_compiled_call_impl", None) is not None:
            kept, step = _for_one_graph(kept, step)
        return args, kept | {"qwenopt_step": step}

    def _pools_of(self, cache: Any) -> Pools:
        if cache not in self._pools:
            self._pools[cache] = pools_of(cache, self._model.config.num_hidden_layers)
        return self._pools[cache]


def use_continuous_batching(model: Any) -> ContinuousBatching:
    """Let `model.generate_batch(...)` and the managers of continuous batching use our kernels.

    Use it in a `with` block, or keep what it returns and call `remove()`. In between the model is for continuous
    batching only; a plain call raises. Works on a compiled model too (`qwenopt.compile`), before or after.

    Raises QwenoptError for a model that is not Qwen3's, a kind of attention or a dtype without kernels, a release of
    transformers before 5, or a CPU without psutil, through which transformers sizes its cache.
    """
    _check_model(model)
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention_forward)
    return ContinuousBatching(model)


def serve(model: str, *, compile: bool = True, **options: Any) -> Any:
    """Start `transformers serve` for one model on our kernels; returns its server, which runs in a thread.

    `options` are those of `transformers.cli.serve.Serve`, as `port`; `compile` is this backend, not Inductor. Stop it
    with `kill_server()`.
    """
    from transformers.cli.serve import Serve

    # Loaded before the first request, and switched before its manager exists, which is made at the first request.
    server = Serve(model, continuous_batching=True, non_blocking=True, **options)
    (loaded,) = server._model_manager.loaded_models.values()
    use_continuous_batching(loaded.model)
    if compile:
        loaded.model.compile(backend="qwenopt")
    return server


def _wanted(config: Any) -> dict[str, Any]:
    """What the config says meanwhile: our attention, and for the scheduler that all layers keep all tokens."""
    wanted: dict[str, Any] = {"_attn_implementation": NAME}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return wanted | ({"sliding_window": None} if getattr(config, "sliding_window", None) else {})
    return wanted | {"layer_types": [_FULL] * len(kinds)}


def _switch(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Set values of the config; returns those before."""
    before = {name: getattr(config, name) for name in values}
    for name, value in values.items():
        setattr(config, name, value)
    return before


def _check_model(model: Any) -> None:
    def refuse(given: str, needed: str) -> None:
        raise QwenoptError(f"use_continuous_batching: {given}; {needed}")

    import transformers

    if int(re.match(r"\d+", transformers.__version__)[0]) != 5:  # type: ignore[index]
        refuse(f"transformers {transformers.__version__}", "needed a release of transformers 5")
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _MODEL_TYPES or not hasattr(model, "generate_batch"):
        refuse(f"{type(model).__name__} of type {kind!r}", f"needed a causal model of type {' or '.join(_MODEL_TYPES)}")
    if config._attn_implementation == NAME:
        refuse("the model is switched already", "leave that `with` block, or call remove(), first")
    others = set(getattr(config, "layer_types", None) or ()) - {_FULL, "sliding_attention"}
    if others:
        refuse(f"layers of {', '.join(sorted(others))}", "needed full or sliding attention")
    if model.dtype not in _DTYPES:
        refuse(f"a model in {model.dtype}", "needed " + ", ".join(map(str, _DTYPES)))
    if model.device.type == "cpu" and not transformers.utils.is_psutil_available():
        refuse("no psutil", "transformers sizes its cache on a CPU through it: pip install psutil")


def _one(kwargs: Mapping[str, Any], *names: str) -> Any:
    """The argument by any of its names; of a list or dict with an entry for each kind of layer, the only entry."""
    value = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if value is None:
        raise unknown(f"no single {' or '.join(names)}")
    return value


def _step(kwargs: Mapping[str, Any], pools: Pools) -> PagedStep:
    if kwargs.get("block_table") is not None:
        raise unknown("a block table to an attention that is not flash attention")
    write, read = _one(kwargs, "write_index"), _one(kwargs, "read_index")
    q_starts, k_starts = _one(kwargs, "cu_seq_lens_q"), _one(kwargs, "cu_seq_lens_k")
    longest = _one(kwargs, "max_length_k", "max_seqlen_k")
    page_size = pools.page_size
    # No sequence has a past: what is read is what is written.
    index, starts = (read, k_starts) if read.numel() else (write, q_starts)
    pages = torch.arange(0, int(longest), page_size, device=index.device)
    first_places = (starts[:-1, None] + pages).clamp(max=index.numel() - 1)  # behind a row's end: any page will do
    positions = _one(kwargs, "position_ids")[0]
    kept = kwargs.get("logits_to_keep")
    return PagedStep(
        pools,
        slots=write.to(torch.int64),
        block_table=(index[first_places] // page_size).to(torch.int32),
        q_starts=q_starts.to(torch.int32),
        q_positions=positions.to(torch.int64),
        num_logits=positions.shape[0] if kept is None else kept.shape[0],
    )


def _for_one_graph(kept: dict[str, Any], step: PagedStep) -> tuple[dict[str, Any], PagedStep]:
    """The same call for a compiled model: no size 0 or 1, for each of which Dynamo would make a graph of its own.

    What is added does nothing: a token of no row with no slot, a row without tokens, pages that are not looked at.
    """

    def general(x: Tensor, fill: int = 0, least: int = 2) -> Tensor:
        # A copy: the scheduler passes slices of one tensor, whose offsets would become guards as well.
        x = F.pad(x, (0, max(0, least - x.shape[-1])), value=fill).clone()
        for dim in range(x.dim()):
            if x.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(x, dim)
        return x

    for memory in step.pools.memories:
        torch._dynamo.maybe_mark_dynamic(memory, 0)
    rows = max(0, 2 - step.block_table.shape[0])
    return {name: general(value) if isinstance(value, Tensor) else value for name, value in kept.items()}, replace(
        step,
        slots=general(step.slots, -1),
        block_table=general(F.pad(step.block_table, (0, 0, 0, rows))),
        q_starts=general(step.q_starts, step.slots.shape[0], least=3),
        q_positions=general(step.q_positions),
    )


@torch.compiler.disable
def _leave(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Cut off the logits that `_for_one_graph` added."""
    output.logits = output.logits[:, : kwargs["qwenopt_step"].num_logits]
    return output
