"""Greedy decoding by plain `model(...)` calls, so that every call goes through whatever compiled the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CACHES = ("none", "dynamic", "static")


def make_cache(kind: str, config: Any, length: int) -> Any:
    """A fresh transformers cache of the kind ("none" gives None); `length` is the room of a static one."""
    from transformers import DynamicCache, StaticCache

    if kind == "static":
        return StaticCache(config=config, max_cache_len=length)
    return DynamicCache(config=config) if kind == "dynamic" else None


def prompt(config: Any, batch: int, length: int = 7, *, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Random ids and, for more than one row, a mask with a different left padding in each row (the first has none)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    if batch == 1:
        return ids, None
    padding = torch.arange(batch)[:, None] % length
    return ids, (torch.arange(length)[None, :] >= padding).long()


@torch.no_grad()
def greedy(
    model: Callable[..., Any],
    config: Any,
    ids: Tensor,
    mask: Tensor | None,
    *,
    cache: str,
    steps: int,
    room: int | None = None,
) -> tuple[Tensor, float]:
    """The greedy continuation [B, steps], and the smallest gap between the two best logits on the way.

    A gap near the rounding error of float32 means that eager itself could have gone the other way. `room` is the length
    of a static cache (default: just enough).
    """
    tokens, gap = [], float("inf")
    state = make_cache(cache, config, room or ids.shape[1] + steps)
    given = ids
    for _ in range(steps):
        kwargs: dict[str, Any] = {"use_cache": False} if state is None else {"past_key_values": state}
        if mask is not None:
            kwargs |= {"attention_mask": mask, "position_ids": positions(mask)[:, -given.shape[1] :]}
        best = model(given, **kwargs).logits[:, -1].topk(2)
        gap = min(gap, (best.values[:, 0] - best.values[:, 1]).min().item())
        token = best.indices[:, :1]
        tokens.append(token)
        given = torch.cat((given, token), 1) if state is None else token
        mask = mask if mask is None else torch.cat((mask, torch.ones_like(token)), 1)
    return torch.cat(tokens, 1), gap


def positions(mask: Tensor) -> Tensor:
    """Position ids of a left-padded batch, as `generate` counts them: the padding shares the position of the start."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: on tiny models the cost of waking a team is all there is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
