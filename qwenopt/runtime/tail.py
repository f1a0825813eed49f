"""Tail: from the logits of a step to the tokens that are emitted."""

from __future__ import annotations

from torch import Tensor, nn

from qwenopt.runtime.sample import Sampler


class Tail(nn.Module):
    """`tail(logits [R, V], emit bool [R]) -> ids int64 [R]`: draw a token for each row, by its own settings.

    Rows that do not emit (their prompt is not through yet, or they have ended) keep their random numbers.
    """

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(self, logits: Tensor, emit: Tensor) -> Tensor:
        """See the class."""
        return self.sampler(logits, active=emit)  # type: ignore[no-any-return]

    def permute_rows(self, order: Tensor) -> None:
        """Row i becomes what row `order[i]` was; int64 [R]."""
        self.sampler.permute_rows(order)
