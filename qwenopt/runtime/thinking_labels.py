"""What a probe learns from: hidden states at boundaries of a model's thinking, and whether stopping there is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwenopt.runtime.generate import generate
from qwenopt.runtime.paged_cache import PagedKVCache
from qwenopt.runtime.thinking import ThinkingConfig
from qwenopt.runtime.thinking_exits import BOUNDARY_BITS, ExitBoundary
from qwenopt.runtime.thinking_tokens import ThinkingTokens

CLOSING = 8  # tokens at most of the text that closes a block early


@dataclass(frozen=True)
class Examples:
    """hidden float32 [X, N], right bool [X], question int64 [X] and the tokens thought until there, int64 [X]."""

    hidden: Tensor
    right: Tensor
    question: Tensor
    thought: Tensor


@torch.no_grad()
def label_boundaries(
    model: Any,
    prompts: Sequence[Sequence[int]],
    is_right: Callable[[int, list[int]], bool],
    tokens: ThinkingTokens,
    *,
    max_new_tokens: int,
    answer_tokens: int = 32,
    boundary: ExitBoundary = "sentence",
    per_question: int = 24,
    cache: PagedKVCache | None = None,
    **sampling: Any,
) -> Examples:
    """Let the model think about each prompt without limit; then end that thinking at its boundaries and see.

    is_right: from a prompt's number and the tokens of a reply to whether its answer is right. At most `per_question`
    boundaries of a prompt are tried, evenly spread over its thinking, each by a reply of up to `answer_tokens` behind
    the short closing text, which is what exit rules write. `cache` must have room for rows of a prompt and its reply
    and `answer_tokens` + `CLOSING` more. sampling: as `generate` takes it. A prompt that is not thought about gives no
    examples.
    """
    given: dict[str, Any] = {"tokenizer": tokens, "cache": cache, **sampling}
    out = generate(model, prompts, max_new_tokens=max_new_tokens, thinking=ThinkingConfig(), **given)
    ends = [_spread(boundaries(reply, tokens, boundary), per_question) for reply in out.replies]
    cuts = [(i, end) for i, row in enumerate(ends) for end in row]
    right = []
    if cuts:
        starts = [[*prompts[i], *out.replies[i][:end]] for i, end in cuts]
        # A budget of 0 behind thinking that has begun closes it at once, by the short text.
        answers = generate(model, starts, max_new_tokens=answer_tokens + CLOSING, thinking=ThinkingConfig(0), **given)
        replies = [out.replies[i][:end] + answer for (i, end), answer in zip(cuts, answers.replies, strict=True)]
        right = [is_right(i, reply) for (i, _), reply in zip(cuts, replies, strict=True)]
    states = [
        _hidden(model, [*prompt, *reply[: max(row)]])[[len(prompt) + end - 1 for end in row]]
        for prompt, reply, row in zip(prompts, out.replies, ends, strict=True)
        if row
    ]
    empty = torch.zeros(0, model.config.get_text_config(decoder=True).hidden_size)
    return Examples(
        torch.cat(states) if states else empty,
        torch.tensor(right, dtype=torch.bool),
        torch.tensor([i for i, _ in cuts], dtype=torch.int64),
        torch.tensor([end - _begin(out.replies[i], tokens) for i, end in cuts], dtype=torch.int64),
    )


def _begin(reply: Sequence[int], tokens: ThinkingTokens) -> int:
    """Where the thinking of a reply begins: behind its marker, or at once where the prompt has it."""
    return reply.index(tokens.start) + 1 if tokens.start in reply else 0


def boundaries(reply: Sequence[int], tokens: ThinkingTokens, boundary: ExitBoundary) -> list[int]:
    """The lengths of a reply's beginnings that end at a boundary inside its first block, as exit rules see them."""
    begin = _begin(reply, tokens)
    end = reply.index(tokens.end) if tokens.end in reply else len(reply)
    mask = BOUNDARY_BITS[boundary]
    return [i + 1 for i in range(begin, end) if int(tokens.lut[reply[i]]) & mask]


def _spread(places: list[int], most: int) -> list[int]:
    """At most `most` of the places, the first and the last among them."""
    if len(places) <= most:
        return places
    step = (len(places) - 1) / max(most - 1, 1)
    return [places[round(i * step)] for i in range(most)]


def _hidden(model: Any, ids: list[int]) -> Tensor:
    """What lm_head is given at every token, float32 [T, N]; not compiled, for each length is another."""
    given = torch.tensor([ids], device=model.device)
    return model.model(input_ids=given, use_cache=False).last_hidden_state[0].float().cpu()  # type: ignore[no-any-return]
