"""generate: prompts of any lengths in, replies out, over one paged cache and compiled steps.

Rows are packed, not padded: a step computes exactly the tokens that are new. Prompts are read in pieces beside replies
that are being written (Agrawal et al., arXiv 2308.16369); a reply that ends frees its pages at once and a waiting
prompt takes its line; equal beginnings are computed once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwenopt.errors import QwenoptError
from qwenopt.runtime.checks import check_whole
from qwenopt.runtime.loop import Loop, Timings, lines_for
from qwenopt.runtime.paged_cache import PagedKVCache
from qwenopt.runtime.prompts import padded, prompts_of, stop_ids_of
from qwenopt.runtime.sampling_defaults import sampling_of
from qwenopt.runtime.sequences import Request
from qwenopt.runtime.tail import Choices, Probe, check_probe
from qwenopt.runtime.thinking import ThinkingConfig, ThinkingStats
from qwenopt.runtime.thinking_tokens import ThinkingTokens

# Tokens of a step that reads prompts: enough for matrix products to run at full speed, few enough for a bounded arena.
PREFILL_TOKENS = 512
_DEFAULT_PAGE = 32


@dataclass
class GenerateOutput:
    """sequences int64 [B, prompt + reply]: prompts padded on the left, replies on the right, as `model.generate` has
    them; the replies alone, without padding; what each row's thinking came to, where it was asked for; timings."""

    sequences: Tensor
    replies: list[list[int]]
    thinking: list[ThinkingStats] | None = None
    timings: Timings = field(default_factory=Timings)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    thinking: Any = None,
    probe: Probe | None = None,
    cache: PagedKVCache | None = None,
    streamer: Any = None,
    seed: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_token_id: int | Collection[int] | None = None,
    tokenizer: Any = None,
    prefill_tokens: int = PREFILL_TOKENS,
    options: Mapping[str, Any] | None = None,
) -> GenerateOutput:
    """Continue each prompt by up to `max_new_tokens` tokens.

    input_ids: int64 [B, S] with attention_mask [B, S] for padding (either side), or a list of prompts of any lengths.
    thinking: a ThinkingConfig, a budget, a dict by the names of any engine, or a list of one of these for each prompt;
    `tokenizer`, whose ids it goes by, must be given then (or a ThinkingTokens made from it).
    probe: from hidden states [R, N] to a score [R], which a ProbeRule in `thinking` goes by; else it is not called.
    cache: a PagedKVCache to use and leave filled for the next call (default: one of the right size, for this call).
    Sampling that is not given is the model's `generation_config`; temperature 0 is greedy. eos_token_id: what ends a
    reply (default: the `generation_config`'s; an empty tuple: nothing). streamer: an object with `put` and `end` as
    transformers has them (one prompt), or a function of the prompt's number and the token. prefill_tokens: the most
    tokens of one step. options: the backend's. The model is compiled by this backend, step by step, whether or not
    it was compiled before. Raises QwenoptError for input that does not fit, and what SamplingParams and ThinkingConfig
    raise, before anything runs.
    """
    start = time.perf_counter()
    prompts = prompts_of(model, input_ids, attention_mask)
    check_whole("generate", max_new_tokens=max_new_tokens, prefill_tokens=prefill_tokens)
    if not isinstance(cache, PagedKVCache | None):
        raise QwenoptError(f"generate: cache {type(cache).__name__}; need a qwenopt.PagedKVCache")
    sampling = sampling_of(model, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    stop_ids = stop_ids_of(model, eos_token_id)
    configs = None if thinking is None else ThinkingConfig.for_rows(thinking, len(prompts), max_new_tokens)
    tokens = None if configs is None else _tokens(tokenizer, model.config.vocab_size, stop_ids)
    requests = [Request(i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
    cache = _cache_for(model, requests) if cache is None else cache
    cache.check_model(model)
    lines = min(lines_for(len(requests)), len(cache.places.block_table))
    if probe is not None:
        check_probe(probe, model, lines)
    choices = Choices(sampling, configs, tokens, lines, model.config.vocab_size, cache.device, probe)
    emit = _emitter(streamer, len(prompts), input_ids)
    loop = Loop(model, cache, requests, choices, lines, stop_ids, prefill_tokens, options or {}, emit)
    loop.run(start)
    if hasattr(streamer, "end"):
        streamer.end()
    replies = [r.reply for r in requests]
    stats = None if configs is None else [loop.stats[i] for i in range(len(requests))]
    return GenerateOutput(padded(model, prompts, replies, input_ids), replies, stats, loop.timings)


def _tokens(tokenizer: Any, vocab_size: int, stop_ids: Collection[int]) -> ThinkingTokens:
    if tokenizer is None:
        raise QwenoptError("generate: thinking=... without tokenizer=...; the ids of <think> and </think> come from it")
    if isinstance(tokenizer, ThinkingTokens):
        return tokenizer
    return ThinkingTokens.of(tokenizer, vocab_size=vocab_size, eos_token_id=sorted(stop_ids))


def _cache_for(model: Any, requests: Sequence[Request]) -> PagedKVCache:
    """A cache in which all requests fit at once."""
    pages = sum(-(-(len(r.prompt) + r.max_new_tokens) // _DEFAULT_PAGE) for r in requests)
    return PagedKVCache(
        model.config,
        max_batch_size=lines_for(len(requests)),
        num_pages=pages,
        page_size=_DEFAULT_PAGE,
        dtype=model.dtype,
        device=model.device,
    )


def _emitter(streamer: Any, num_prompts: int, input_ids: Any) -> Callable[[int, int], object]:
    if streamer is None:
        return lambda index, token: None
    if not hasattr(streamer, "put"):
        if not callable(streamer):
            raise QwenoptError(f"generate: streamer {streamer!r}; need an object with put and end, or a function")
        return streamer  # type: ignore[no-any-return]
    if num_prompts != 1:
        raise QwenoptError(
            f"generate: a streamer with put takes one prompt, {num_prompts} given; pass a function of the prompt's "
            "number and the token"
        )
    streamer.put(torch.as_tensor(input_ids).cpu())
    return lambda index, token: streamer.put(torch.tensor([token]))
