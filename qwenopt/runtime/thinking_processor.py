"""Thinking control for plain `model.generate()`: a logits processor of transformers with the semantics of the op.

It runs the same op between steps of transformers' own loop. What it cannot do there: the processor sees logits, not
the token that sampling will draw. So a token is forced by hiding all others, and where the budget ends, the model's own
`</think>` is kept only if it is the likeliest token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwenopt.ops.budget_state import Column, Phase
from qwenopt.runtime.thinking import ThinkingConfig, ThinkingStats
from qwenopt.runtime.thinking_exits import ProbeRule
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.runtime.thinking_tokens import ThinkingTokens


class ThinkingLogitsProcessor:
    """`model.generate(..., logits_processor=[ThinkingLogitsProcessor(tokenizer, thinking)])`.

    `thinking` is what `ThinkingConfig.of` takes, or a list of one for each row; `pad_token_id` marks the left padding
    of prompts (default: the tokenizer's). `max_new_tokens` is needed by `reserve_answer`. Beams are followed. A
    processor serves one call of generate; make another for the next, or call `reset`. Works with greedy search,
    sampling and beams; a probe rule needs the hidden state, which a processor does not see, and is refused.
    """

    def __init__(
        self,
        tokenizer: Any,
        thinking: Any,
        *,
        max_new_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        self.tokens = ThinkingTokens.of(tokenizer, eos_token_id=eos_token_id)
        self.thinking, self.max_new_tokens = thinking, max_new_tokens
        self.pad = tokenizer.pad_token_id if pad_token_id is None else pad_token_id
        self.reset()

    def reset(self) -> None:
        """Forget the sequences: the next call begins anew."""
        self._state: ThinkingState | None = None
        self._ids = torch.empty(0)
        self._forced = self._likeliest = torch.empty(0)

    def _begin(self, input_ids: Tensor) -> ThinkingState:
        """A row for each sequence; beams of one prompt share its configuration."""
        rows = len(input_ids)
        listed = isinstance(self.thinking, (list, tuple))
        prompts = len(self.thinking) if listed else rows
        if prompts == 0 or rows % prompts:
            raise ValueError(f"thinking: {prompts} values for {rows} rows; give one for each, or one for all")
        configs = ThinkingConfig.for_rows(self.thinking, prompts, self.max_new_tokens)
        signals = {rule.to_dict()["rule"] for config in configs for rule in config.exits} & {"margin", "entropy"}
        for config in configs:
            if any(isinstance(rule, ProbeRule) for rule in config.exits):
                raise ValueError("thinking: a probe rule needs the hidden state, which a logits processor does not see")
            if config.answer_sampling is not None:
                raise ValueError("thinking: answer_sampling cannot be enforced by a logits processor")
        state = ThinkingState(rows, self.tokens, signals=sorted(signals), max_forced=512, device=input_ids.device)
        for row, ids in enumerate(input_ids.tolist()):
            start = next((i for i, token in enumerate(ids) if token != self.pad), 0)
            state.admit(row, configs[row // (rows // prompts)], ids[start:], self.max_new_tokens)
        return state

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [R, V] for the token after input_ids [R, T]."""
        if self._state is None:
            self._state = self._begin(input_ids)
        else:
            self._follow(self._state, input_ids)
        state = self._state
        self._ids = input_ids.clone()
        scores = state.adjust_(scores.float() if scores.dtype == torch.float16 else scores.clone())
        return self._hide(state, scores)

    def _follow(self, state: ThinkingState, input_ids: Tensor) -> None:
        """Advance each row by the token that was chosen, after rows have moved as beams do."""
        if input_ids.shape[1] != self._ids.shape[1] + 1:
            raise ValueError(
                f"ThinkingLogitsProcessor: {input_ids.shape[1]} tokens after {self._ids.shape[1]}; it must see every "
                "token once, so use a new processor, or reset(), for each call of generate"
            )
        if not torch.equal(self._ids, input_ids[:, :-1]):
            same = (input_ids[:, None, :-1] == self._ids[None]).all(-1)
            if not bool(same.any(1).all()):
                raise ValueError("ThinkingLogitsProcessor: rows that were not there before; use a new processor")
            order = same.int().argmax(1)
            state.permute_rows(order)
            self._forced, self._likeliest = self._forced[order], self._likeliest[order]
        # A forced row goes on as it did when it was asked, whatever the forced token would have meant if sampled.
        state.step(torch.where(self._forced, self._likeliest, input_ids[:, -1]))

    def _hide(self, state: ThinkingState, scores: Tensor) -> Tensor:
        """Leave only the forced token in rows that must write one; it gets 0, so a beam's score does not change.

        In the others, what sampling might draw and the state would replace is hidden.
        """
        before = state.state.clone()
        self._likeliest = scores.argmax(-1)
        out = state.step(self._likeliest)
        after = state.state.clone()
        state.state.copy_(before)
        self._forced = (after[:, Column.FORCED] > before[:, Column.FORCED]) | (out != self._likeliest)
        think = (before[:, Column.PHASE] == Phase.THINK) | (before[:, Column.PHASE] == Phase.GRACE)
        replaced = think & ((before[:, Column.CLOSE] == 1) | (after[:, Column.PHASE] == Phase.GRACE))
        early = think & (before[:, Column.WAIT] == 1) & (before[:, Column.USED] < before[:, Column.MIN])
        for token in self.tokens.eos:
            scores[:, token] = torch.where(replaced, -torch.inf, scores[:, token])
        scores[:, self.tokens.end] = torch.where(early, -torch.inf, scores[:, self.tokens.end])
        only = torch.full_like(scores, -torch.inf).scatter_(1, out[:, None], 0.0)
        return torch.where(self._forced[:, None], only, scores)

    def stats(self, output_ids: Tensor | None = None) -> list[ThinkingStats]:
        """What each row's thinking came to. Give generate's output, whose last token no processor has seen."""
        if self._state is None:
            return []
        if output_ids is not None and output_ids.shape[1] == self._ids.shape[1] + 1:
            self._follow(self._state, output_ids)
            self._ids = output_ids
        return [self._state.stats(row) for row in range(self._state.rows)]

    @property
    def answering(self) -> Tensor:
        """Rows whose next token belongs to the answer, bool [R]."""
        return torch.empty(0) if self._state is None else self._state.state[:, Column.PHASE] >= Phase.ANSWER
