"""A transformers model on static caches: the engine of eager, of this backend and of other compilers of torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers.peer import Timing

DTYPE = "bfloat16"


class TransformersEngine:
    """Calls the model as `qwenopt.cli.speed` does. Prompts of a decode are read by eager; that is not timed."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self._model, self._call = model, call
        self._caches: dict[tuple[int, int], Any] = {}

    def prefill(self, prompt: list[int]) -> Timing:
        import torch

        ids = torch.tensor([prompt])
        cache = self._cache(1, len(prompt))
        begin = time.perf_counter()
        following = self._run(self._call, ids, cache)
        return Timing(time.perf_counter() - begin, following.flatten().tolist())

    def decode(self, prompts: list[list[int]], steps: int) -> Timing:
        import torch

        cache = self._cache(len(prompts), len(prompts[0]) + steps)
        first = ids = self._run(self._model.forward, torch.tensor(prompts), cache)
        begin = time.perf_counter()
        for _ in range(steps):
            ids = self._run(self._call, ids, cache)
        return Timing(time.perf_counter() - begin, first.flatten().tolist())

    def _cache(self, batch: int, length: int) -> Any:
        """An emptied cache; one for each shape, since graphs are specialised to it."""
        from transformers import StaticCache

        cache = self._caches.get((batch, length))
        if cache is None:
            config = self._model.config
            cache = StaticCache(config=config, max_cache_len=length)
            cache.early_initialization(
                batch, config.num_key_value_heads, config.head_dim, self._model.dtype, self._model.device
            )
            self._caches[batch, length] = cache
        cache.reset()
        return cache

    def _run(self, call: Callable[..., Any], ids: Any, cache: Any) -> Any:
        """The most likely next token of each sequence, [B, 1]."""
        import torch

        with torch.no_grad():
            output = call(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)


def load(folder: Path, threads: int, backend: str) -> TransformersEngine:
    """The checkpoint under one of the backends that `qwenopt.cli.speed` knows: "eager", "qwenopt" or torch's own."""
    import torch

    from qwenopt.cli import checkpoint, speed

    torch.set_num_threads(threads)
    model = checkpoint.load(folder, DTYPE)
    return TransformersEngine(model, speed.calls(model, (backend,))[backend])
