"""Random prompts, and what transformers itself says to them."""

from __future__ import annotations

import random
from typing import Any

import torch


def prompts_for(model: Any, lengths: list[int], *, seed: int = 0) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]


def wanted(model: Any, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Each prompt alone, by transformers' own loop and cache."""
    found = []
    for p in prompts:
        ids = torch.tensor([p])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        found.append(out[0, len(p) :].tolist())
    return found
