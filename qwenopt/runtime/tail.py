"""Tail: from the logits of a step to the tokens that are emitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qwenopt.errors import QwenoptError
from qwenopt.runtime.sample import Sampler, SamplingParams
from qwenopt.runtime.thinking import ThinkingConfig, ThinkingStats
from qwenopt.runtime.thinking_exits import EntropyRule, MarginRule, ProbeRule
from qwenopt.runtime.thinking_replay import take_forced
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.runtime.thinking_tokens import ThinkingTokens

Probe = Callable[[Tensor], Tensor]
_SIGNALS = {MarginRule: "margin", EntropyRule: "entropy"}


class Tail(nn.Module):
    """`tail(logits [R, V], emit bool [R], hidden [R, N]) -> ids int64 [R]`: draw a token for each row, by its own
    settings.

    With `thinking`, what the rows think is kept within its bounds. Rows that do not emit (their prompt is not through
    yet, or they have ended) keep their random numbers and their state. `reads_hidden` says whether `hidden`, what
    lm_head was given, is read: by a probe. It may be left out otherwise.
    """

    def __init__(self, sampler: Sampler, thinking: ThinkingState | None = None) -> None:
        super().__init__()
        self.sampler, self.thinking = sampler, thinking
        self.reads_hidden = thinking is not None and thinking.probe is not None

    @property
    def kind(self) -> tuple[object, ...]:
        """What the graph of this tail depends on: tails of one kind share theirs."""
        reads = None if self.thinking is None else (self.thinking.max_forced, *sorted(self.thinking.reads))
        return self.sampler.greedy, self.sampler.penalties, self.sampler.max_top_k, reads

    def forward(self, logits: Tensor, emit: Tensor, hidden: Tensor | None = None) -> Tensor:
        """See the class."""
        if self.thinking is None:
            ids = self.sampler(logits, None, emit)
            self.sampler.observe(ids, emit)
            return ids  # type: ignore[no-any-return]
        return self.thinking(logits, self.sampler, emit, hidden)  # type: ignore[no-any-return]


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
        probe: Probe | None = None,
    ) -> None:
        self.sampling, self.configs = sampling, thinking
        answers = [c.answer_sampling for c in thinking or () if c.answer_sampling is not None]
        sampler = Sampler.fitting([sampling, *answers], vocab_size, device, rows=lines)
        state = None
        if thinking is not None and tokens is not None:
            state = _state(thinking, tokens, lines, device, probe)
        self.tail = Tail(sampler, state)

    def begin(self, line: int, index: int, prompt: Iterable[int], max_new_tokens: int) -> None:
        """Request `index` starts on that line."""
        prompt, sampling, sampler = list(prompt), self.sampling, self.tail.sampler
        config = None if self.configs is None else self.configs[index]
        answer = None if config is None else config.answer_sampling
        if sampling.seed is not None:  # rows of one seed differ, and a row is the same in any company
            sampling = replace(sampling, seed=(sampling.seed + index) % (1 << 64))
        if sampler.reads_settings:
            sampler.set_row(line, sampling, answer=answer, prompt_ids=prompt)
        if self.tail.thinking is not None:
            self.tail.thinking.admit(line, config, prompt, max_new_tokens)

    def forcing(self) -> list[bool]:
        """For each line, whether `forced` has tokens for it. One read of the state for all of them."""
        state = self.tail.thinking
        return [False] * self.tail.sampler.rows if state is None else state.forcing()

    def forced(self, line: int, most: int | None = None) -> list[int]:
        """Up to `most` tokens that must follow on that line, known before they are computed; the row is then behind
        them.
        """
        if self.tail.thinking is None:
            return []
        ahead, sampler = take_forced(self.tail.thinking, line, most), self.tail.sampler
        if ahead:
            sampler.steps[line] += len(ahead)  # as many random numbers as one by one
        if ahead and sampler.penalties:
            alone = torch.arange(sampler.rows, device=sampler.steps.device) == line
            for token in ahead:
                sampler.observe(torch.full_like(alone, token, dtype=torch.int64), alone)
        return ahead

    def stats(self, line: int) -> ThinkingStats | None:
        """What the thinking on that line has come to."""
        return None if self.tail.thinking is None else self.tail.thinking.stats(line)


def _state(
    configs: Sequence[ThinkingConfig],
    tokens: ThinkingTokens,
    lines: int,
    device: torch.device,
    probe: Probe | None,
) -> ThinkingState:
    rules = {type(rule) for config in configs for rule in config.exits}
    if ProbeRule in rules and probe is None:
        raise QwenoptError(
            "generate: ProbeRule without probe=...; need the probe whose score it reads, such as a ThinkingProbe that "
            "`qwenopt calibrate` has written"
        )
    signals = [signal for rule, signal in _SIGNALS.items() if rule in rules]
    room = max(
        len(tokens.text("stop_text", c.stop_text)) + len(tokens.text("exit_stop_text", c.exit_stop_text))
        for c in configs
    )
    room += len(tokens.empty_block)
    return ThinkingState(
        lines,
        tokens,
        signals=signals,
        probe=probe if ProbeRule in rules else None,  # hidden states are handed on only where they are read
        max_forced=max(64, room),
        device=device,
    )


def check_probe(probe: Any, model: Any, lines: int) -> None:
    """Raise QwenoptError unless `probe` gives a score for each of `lines` rows of the model's hidden states."""
    size = model.config.get_text_config(decoder=True).hidden_size
    hidden = torch.zeros(lines, size, dtype=model.dtype, device=model.device)
    needed = f"generate: probe {type(probe).__name__}; need a function from hidden states {tuple(hidden.shape)} "
    needed += f"{hidden.dtype} on {hidden.device} to {lines} scores"
    try:
        scores = probe(hidden)
    except Exception as error:  # whatever a stranger's function raises
        raise QwenoptError(f"{needed}; it raised {type(error).__name__}: {error}") from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.numel() != lines:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise QwenoptError(f"{needed} in floating point; it gave {found}")
