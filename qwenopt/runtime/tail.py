"""Tail: from the logits of a step to the tokens that are emitted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qwenopt.errors import QwenoptError
from qwenopt.runtime.sample import Sampler, SamplingParams
from qwenopt.runtime.thinking import ThinkingConfig, ThinkingStats
from qwenopt.runtime.thinking_exits import EntropyRule, MarginRule, ProbeRule
from qwenopt.runtime.thinking_replay import take_forced
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.runtime.thinking_tokens import ThinkingTokens

_SIGNALS = {MarginRule: "margin", EntropyRule: "entropy"}


class Tail(nn.Module):
    """`tail(logits [R, V], emit bool [R]) -> ids int64 [R]`: draw a token for each row, by its own settings.

    With `thinking`, what the rows think is kept within its bounds. Rows that do not emit (their prompt is not through
    yet, or they have ended) keep their random numbers and their state.
    """

    def __init__(self, sampler: Sampler, thinking: ThinkingState | None = None) -> None:
        super().__init__()
        self.sampler, self.thinking = sampler, thinking

    def forward(self, logits: Tensor, emit: Tensor) -> Tensor:
        """See the class."""
        if self.thinking is None:
            ids = self.sampler(logits, None, emit)
            self.sampler.observe(ids, emit)
            return ids  # type: ignore[no-any-return]
        return self.thinking(logits, self.sampler, emit)  # type: ignore[no-any-return]


class Choices:
    """How each request of a generation is sampled and thinks, and the tail that does it for `lines` rows at a time."""

    def __init__(
        self,
        sampling: SamplingParams,
        thinking: Sequence[ThinkingConfig] | None,
        tokens: ThinkingTokens | None,
        lines: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.sampling, self.configs = sampling, thinking
        answers = [c.answer_sampling for c in thinking or () if c.answer_sampling is not None]
        sampler = Sampler.fitting([sampling, *answers], vocab_size, device, rows=lines)
        state = None
        if thinking is not None and tokens is not None:
            state = _state(thinking, tokens, lines, device)
        self.tail = Tail(sampler, state)

    def begin(self, line: int, index: int, prompt: Iterable[int], max_new_tokens: int) -> None:
        """Request `index` starts on that line."""
        prompt, sampling, sampler = list(prompt), self.sampling, self.tail.sampler
        config = None if self.configs is None else self.configs[index]
        answer = None if config is None else config.answer_sampling
        if sampling.seed is not None:  # rows of one seed differ, and a row is the same in any company
            sampling = replace(sampling, seed=(sampling.seed + index) % (1 << 64))
        if not sampler.greedy or sampler.penalties:
            sampler.set_row(line, sampling, answer=answer, prompt_ids=prompt)
        if self.tail.thinking is not None:
            self.tail.thinking.admit(line, config, prompt, max_new_tokens)

    def forced(self, line: int, most: int | None = None) -> list[int]:
        """Up to `most` tokens that must follow on that line, known before they are computed; the row is then behind
        them.
        """
        if self.tail.thinking is None:
            return []
        ahead, sampler = take_forced(self.tail.thinking, line, most), self.tail.sampler
        if ahead:
            alone = torch.arange(sampler.rows, device=sampler.steps.device) == line
            sampler.steps[line] += len(ahead)  # as many random numbers as one by one
            for token in ahead:
                sampler.observe(torch.full_like(alone, token, dtype=torch.int64), alone)
        return ahead

    def stats(self, line: int) -> ThinkingStats | None:
        """What the thinking on that line has come to."""
        return None if self.tail.thinking is None else self.tail.thinking.stats(line)


def _state(
    configs: Sequence[ThinkingConfig], tokens: ThinkingTokens, lines: int, device: torch.device
) -> ThinkingState:
    rules = {type(rule) for config in configs for rule in config.exits}
    if ProbeRule in rules:
        raise QwenoptError("generate: ProbeRule reads hidden states, which this loop does not hand on; use other rules")
    signals = [signal for rule, signal in _SIGNALS.items() if rule in rules]
    room = max(
        len(tokens.text("stop_text", c.stop_text)) + len(tokens.text("exit_stop_text", c.exit_stop_text))
        for c in configs
    )
    room += len(tokens.empty_block)
    return ThinkingState(lines, tokens, signals=signals, max_forced=max(64, room), device=device)
