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
from torch import Tensor, nn

from qwenopt.errors import QwenoptError
from qwenopt.runtime.packed_batch import PackedBatch
from qwenopt.runtime.paged_cache import PagedKVCache
from qwenopt.runtime.prompts import padded, prompts_of, stop_ids_of
from qwenopt.runtime.sample import Sampler, SamplingParams
from qwenopt.runtime.sampling_defaults import sampling_of
from qwenopt.runtime.sequences import Request, Schedule
from qwenopt.runtime.step import Stepper
from qwenopt.runtime.tail import Tail

# Tokens of a step that reads prompts: enough for matrix products to run at full speed, few enough for a bounded arena.
PREFILL_TOKENS = 512
_DEFAULT_PAGE = 32


@dataclass
class Timings:
    """Where the time of a generation went, in seconds. A step that reads prompts may write replies as well."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    shared_tokens: int = 0  # of prompts, found in the cache instead of computed
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    prefill_steps: int = 0
    decode_steps: int = 0


@dataclass
class GenerateOutput:
    """sequences int64 [B, prompt + reply]: prompts padded on the left, replies on the right, as `model.generate` has
    them; the replies alone, without padding; timings."""

    sequences: Tensor
    replies: list[list[int]]
    thinking: Any = None
    timings: Timings = field(default_factory=Timings)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    thinking: Any = None,
    cache: PagedKVCache | None = None,
    streamer: Any = None,
    seed: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_token_id: int | Collection[int] | None = None,
    prefill_tokens: int = PREFILL_TOKENS,
    options: Mapping[str, Any] | None = None,
) -> GenerateOutput:
    """Continue each prompt by up to `max_new_tokens` tokens.

    input_ids: int64 [B, S] with attention_mask [B, S] for padding (either side), or a list of prompts of any lengths.
    cache: a PagedKVCache to use and leave filled for the next call (default: one of the right size, for this call).
    Sampling that is not given is the model's `generation_config`; temperature 0 is greedy. eos_token_id: what ends a
    reply (default: the `generation_config`'s; an empty tuple: nothing). streamer: an object with `put` and `end` as
    transformers has them (one prompt), or a function of the prompt's number and the token. prefill_tokens: the most
    tokens of one step. options: the backend's. The model is compiled by this backend, step by step, whether or not
    it was compiled before. Raises QwenoptError for input that does not fit, before anything runs.
    """
    start = time.perf_counter()
    prompts = prompts_of(model, input_ids, attention_mask)
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise QwenoptError(f"generate: max_new_tokens={max_new_tokens!r}; need a whole number of at least 1")
    sampling = sampling_of(model, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    requests = [Request(i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
    if cache is None:
        cache = _cache_for(model, requests)
    cache.check_model(model)
    emit = _emitter(streamer, len(prompts), input_ids)
    loop = Loop(model, cache, requests, sampling, stop_ids_of(model, eos_token_id), prefill_tokens, options or {}, emit)
    loop.timings.prompt_tokens = sum(map(len, prompts))
    loop.run(start)
    if hasattr(streamer, "end"):
        streamer.end()
    replies = [r.reply for r in requests]
    return GenerateOutput(padded(model, prompts, replies, input_ids), replies, None, loop.timings)


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


def lines_for(num_rows: int) -> int:
    """Lines of the batch for that many rows: a power of two, so that few numbers of rows have graphs of their own."""
    return 1 << (num_rows - 1).bit_length()


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


class Loop:
    """The steps of one generation."""

    def __init__(
        self,
        model: nn.Module,
        cache: PagedKVCache,
        requests: Sequence[Request],
        sampling: SamplingParams,
        stop_ids: Collection[int],
        prefill_tokens: int,
        options: Mapping[str, Any],
        emit: Callable[[int, int], object],
    ) -> None:
        most = len(cache.places.block_table)
        lines = min(lines_for(len(requests)), most)
        self.schedule = Schedule(cache, requests, lines)
        self.sampling, self.stop_ids, self.on_token = sampling, frozenset(stop_ids), emit
        vocab = model.config.vocab_size  # type: ignore[union-attr]
        self.tail = Tail(Sampler.fitting([sampling] * lines, vocab, cache.device))
        self.stepper = Stepper(model, self.tail, options)
        self.prefill = PackedBatch(cache, lines, max(prefill_tokens, lines), dynamic=True)
        self.decode = PackedBatch(cache, lines, lines)
        self.emits = torch.zeros(lines, dtype=torch.bool, device=cache.device)
        self.out = torch.zeros(lines, dtype=torch.int64, device=cache.device)
        self.timings = Timings()

    def run(self, start: float) -> None:
        """Until every request has its reply. Whatever happens, no row is left in the cache."""
        try:
            while self.schedule.waiting or self.schedule.working:
                for line, request in self.schedule.admit():
                    self._begin(line, request)
                self._step(start)
        finally:
            self.schedule.close()

    def _begin(self, line: int, request: Request) -> None:
        self.timings.shared_tokens += request.done
        seed = self.sampling.seed
        if not self.sampling.greedy:
            params = self.sampling if seed is None else _with_seed(self.sampling, seed + request.index)
            self.tail.sampler.set_row(line, params)

    def _step(self, start: float) -> None:
        begin = time.perf_counter()
        reading = self.schedule.reading
        batch = self.prefill if reading else self.decode
        pieces = self.schedule.pieces(batch.num_tokens)
        batch.fill(pieces)
        ending = [r is not None and r.left == 0 for r in self.schedule.lines]
        self.emits.copy_(torch.tensor(ending))
        self.stepper(batch, self.emits, self.out)
        for line, token in enumerate(self.out.tolist()):
            if ending[line]:
                self._emit(line, token, start)
        spent = time.perf_counter() - begin
        if reading:
            self.timings.prefill_seconds += spent
            self.timings.prefill_steps += 1
        else:
            self.timings.decode_seconds += spent
            self.timings.decode_steps += 1

    def _emit(self, line: int, token: int, start: float) -> None:
        request = self.schedule.lines[line]
        assert request is not None
        if self.timings.new_tokens == 0:
            self.timings.first_token_seconds = time.perf_counter() - start
        self.timings.new_tokens += 1
        request.reply.append(token)
        if token in self.stop_ids or len(request.reply) == request.max_new_tokens:
            self.schedule.end(line)
        self.on_token(request.index, token)


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    from dataclasses import replace

    return replace(params, seed=seed % (1 << 64))
