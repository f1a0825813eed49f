"""This package's own loop, `qwenopt.generate`, over a paged cache; in the environment of the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers.peer import Engine, Peer, PeerError, Timing
from bench.peers.transformers_engine import DTYPE

PAGE_SIZE = 32


class GenerateEngine:
    """Greedy replies; the seconds are those that `generate` gives for its steps of prompts and of replies."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: dict[tuple[int, int], Any] = {}

    def prefill(self, prompt: list[int]) -> Timing:
        cache = self._cache(1, len(prompt) + 1)
        # What the last call left in the pages would be found, so another prompt takes all of them.
        self._reply(cache, [(prompt[::-1] * 2)[: cache.num_pages * PAGE_SIZE - 1]], 1)
        output = self._reply(cache, [prompt], 1)
        if output.timings.shared_tokens:
            raise PeerError(f"{output.timings.shared_tokens} tokens of the prompt were found in the cache")
        return Timing(output.timings.prefill_seconds, [reply[0] for reply in output.replies])

    def decode(self, prompts: list[list[int]], steps: int) -> Timing:
        output = self._reply(self._cache(len(prompts), len(prompts[0]) + steps + 1), prompts, steps + 1)
        if output.timings.decode_steps != steps:
            raise PeerError(f"{output.timings.decode_steps} steps of replies alone instead of {steps}")
        return Timing(output.timings.decode_seconds, [reply[0] for reply in output.replies])

    def _reply(self, cache: Any, prompts: list[list[int]], new_tokens: int) -> Any:
        import qwenopt

        cache.reset()
        return qwenopt.generate(
            self._model, prompts, max_new_tokens=new_tokens, temperature=0.0, eos_token_id=(), cache=cache
        )

    def _cache(self, batch: int, length: int) -> Any:
        from qwenopt import PagedKVCache

        if (batch, length) not in self._caches:
            self._caches[batch, length] = PagedKVCache(
                self._model.config,
                max_batch_size=batch,
                num_pages=batch * -(-length // PAGE_SIZE),
                page_size=PAGE_SIZE,
                dtype=self._model.dtype,
            )
        return self._caches[batch, length]


class Generate(Peer):
    """Past Dynamo's guards and transformers' wrappers, which `Ours` pays for at every token."""

    name = "qwenopt.generate"
    packages = ("qwenopt", "torch", "transformers")

    def load(self, model: Path, threads: int) -> Engine:
        import torch

        from qwenopt.cli import checkpoint

        torch.set_num_threads(threads)
        return GenerateEngine(checkpoint.load(model, DTYPE))
