"""ThinkingTail: from the logits of a step to the tokens that are emitted, with thinking under control."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from qwenopt.runtime.sample import Sampler
from qwenopt.runtime.thinking import ThinkingConfig, ThinkingStats
from qwenopt.runtime.thinking_replay import take_forced
from qwenopt.runtime.thinking_state import ThinkingState


class ThinkingTail(nn.Module):
    """`tail(logits [R, V], emit bool [R]) -> ids int64 [R]`, in place of `Tail`, for as many rows as the state has.

    Rows that do not emit keep their random numbers and their state. The logits are written to.
    """

    def __init__(self, state: ThinkingState, sampler: Sampler) -> None:
        super().__init__()
        if sampler.rows != state.rows:
            raise ValueError(f"ThinkingTail: a state of {state.rows} rows and a sampler of {sampler.rows}")
        self.state, self.sampler = state, sampler

    def forward(self, logits: Tensor, emit: Tensor, hidden: Tensor | None = None) -> Tensor:
        """See the class; hidden [R, N] is for the state's probe."""
        ids: Tensor = self.state(logits, self.sampler, emit, hidden)
        return ids

    def begin(
        self, row: int, config: ThinkingConfig | None, prompt_ids: Iterable[int], max_new_tokens: int | None = None
    ) -> None:
        """A new sequence in `row`; its sampling is set apart, by `sampler.set_row`."""
        self.state.admit(row, config, prompt_ids, max_new_tokens)

    def ahead(self, row: int) -> list[int]:
        """After a step: the tokens that the row is forced to write next, all of them, so that one forward may take
        them at once. The row then stands behind them, its random numbers included, as after a step for each.
        """
        ids = take_forced(self.state, row)
        self.sampler.steps[row] += len(ids)
        if self.sampler.penalties:
            for token in ids:
                self.sampler.counts[row, token] += 1
        return ids

    def stats(self, row: int) -> ThinkingStats:
        """What the row's thinking has come to."""
        return self.state.stats(row)

    def permute_rows(self, order: Tensor) -> None:
        """Row i becomes what row `order[i]` was; int64 [R]."""
        self.state.permute_rows(order)
        self.sampler.permute_rows(order)
