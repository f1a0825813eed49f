"""What a user hands to generate -> lists of tokens, and replies back into one tensor."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from qwenopt.errors import QwenoptError

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def prompts_of(model: Any, input_ids: Any, attention_mask: Tensor | None) -> list[list[int]]:
    """The prompts without their padding. Raises QwenoptError for what is none."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2 or input_ids.dtype not in _WHOLE:
            raise QwenoptError(
                f"generate: input_ids {tuple(input_ids.shape)} {input_ids.dtype}; need whole numbers (B, S), or a list "
                "of prompts"
            )
        rows = input_ids.tolist()
        if attention_mask is not None:
            _check_mask(attention_mask, input_ids)
            rows = [_visible(i, *pair) for i, pair in enumerate(zip(rows, attention_mask.tolist(), strict=True))]
    elif attention_mask is not None:
        raise QwenoptError("generate: an attention_mask beside a list of prompts; lists have no padding to mask")
    else:
        rows = _lists(input_ids)
    if not rows:
        raise QwenoptError("generate: no prompt; need at least one")
    vocab = model.config.vocab_size
    for i, row in enumerate(rows):
        if not row:
            raise QwenoptError(f"generate: prompt {i} is empty; need at least one token")
        if min(row) < 0 or max(row) >= vocab:
            bad = next(t for t in row if not 0 <= t < vocab)
            raise QwenoptError(f"generate: prompt {i} has token {bad}; the vocabulary has 0 to {vocab - 1}")
    return rows


def _lists(prompts: Any) -> list[list[int]]:
    try:
        return [[operator.index(token) for token in row] for row in prompts]
    except TypeError as error:
        raise QwenoptError(
            f"generate: prompts of something else than token ids ({error}); need lists of ids"
        ) from error


def _check_mask(attention_mask: Any, input_ids: Tensor) -> None:
    shape = tuple(getattr(attention_mask, "shape", ()))
    if not isinstance(attention_mask, Tensor) or shape != tuple(input_ids.shape):
        raise QwenoptError(
            f"generate: attention_mask {type(attention_mask).__name__} {shape} for input_ids {tuple(input_ids.shape)}; "
            "need a tensor of that shape"
        )


def _visible(index: int, row: list[int], mask: list[Any]) -> list[int]:
    seen = [i for i, m in enumerate(mask) if m]
    if seen and seen[-1] - seen[0] + 1 != len(seen):
        raise QwenoptError(f"generate: the attention_mask of prompt {index} has holes; only padding can be masked")
    return row[seen[0] : seen[-1] + 1] if seen else []


def stop_ids_of(model: Any, eos_token_id: int | Collection[int] | None) -> set[int]:
    """What ends a reply."""
    found = eos_token_id
    if found is None:
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = model.config.eos_token_id
    if found is None:
        return set()
    try:
        return {operator.index(i) for i in ([found] if isinstance(found, int) else found)}
    except TypeError as error:
        raise QwenoptError(f"generate: eos_token_id={found!r}; need a token id, or several") from error


def padded(model: Any, prompts: Sequence[list[int]], replies: Sequence[list[int]], input_ids: Any) -> Tensor:
    """Prompts as they were given, or padded on the left; then the replies, padded on the right. int64 [B, ...]."""
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    pad = 0 if pad is None else pad
    if isinstance(input_ids, Tensor):
        left = input_ids.tolist()
    else:
        longest = max(map(len, prompts))
        left = [[pad] * (longest - len(p)) + p for p in prompts]
    longest = max(map(len, replies))
    rows = [a + b + [pad] * (longest - len(b)) for a, b in zip(left, replies, strict=True)]
    return torch.tensor(rows, dtype=torch.int64, device=model.device)
