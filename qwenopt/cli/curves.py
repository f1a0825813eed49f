"""Accuracy against thinking tokens: one point for each budget and each threshold of an exit rule."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenopt.runtime.thinking import ThinkingConfig

RULES = ("margin", "loop", "entropy", "probe")
THRESHOLDS: dict[str, tuple[float, ...]] = {
    "margin": (0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 13.0, 14.0, 15.0, 16.0),
    "loop": (2, 3, 4, 5, 6, 8),
    "entropy": (0.00001, 0.0001, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0),
    "probe": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995),
}
NUM_BUDGETS = 12
SMALLEST_SHARE = 12  # the least budget but 0 is this part of the largest
LARGEST_SHARE = 0.9  # of the replies whose own thinking fits into the largest budget
TOLERANCE = 0.01  # of accuracy, that a setting may lose to be called good
_EPSILON = 1e-9
CSV_COLUMNS = (
    ("rule", "threshold", "questions", "accuracy", "standard_error", "lost", "won", "thinking_tokens")
    + ("forced_tokens", "generated_tokens", "saved", "most_over_budget", "cut_off", "seconds")
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One configuration to measure; rule is "unlimited", "budget" or one of RULES."""

    rule: str
    threshold: float | None
    config: ThinkingConfig


@dataclass
class Point:
    """What a setting came to; of every question: right (bool), thought, forced and generated (tokens).

    lost, won: questions that unlimited thinking alone answers, and that this setting alone does. reasons: how thinking
    ended, by the number of replies. cut_off: replies that max_new_tokens ended. most_over_budget: the most tokens
    thought beyond the budget, at least 0; None where there is none. seconds: wall clock, compilation included.
    """

    rule: str
    threshold: float | None
    right: list[bool] = field(repr=False)
    thought: list[int] = field(repr=False)
    forced: list[int] = field(repr=False)
    generated: list[int] = field(repr=False)
    reasons: dict[str, int]
    cut_off: int
    seconds: float
    most_over_budget: int | None = None
    lost: int = 0
    won: int = 0
    saved: float = 0.0

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return statistics.fmean(self.right)

    @property
    def thinking_tokens(self) -> float:
        """The mean number of tokens thought; closing texts are not among them."""
        return statistics.fmean(self.thought)

    def compare(self, unlimited: Point) -> None:
        """Set what is told beside unlimited thinking on the same questions."""
        pairs = list(zip(self.right, unlimited.right, strict=True))
        self.lost, self.won = pairs.count((False, True)), pairs.count((True, False))
        self.saved = 1 - self.thinking_tokens / max(unlimited.thinking_tokens, _EPSILON)

    def to_dict(self) -> dict[str, Any]:
        """Figures only, in values that JSON and CSV have."""
        return {
            "rule": self.rule,
            "threshold": self.threshold,
            "questions": len(self.right),
            "accuracy": round(self.accuracy, 6),
            "standard_error": round(math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.right)), 6),
            "lost": self.lost,
            "won": self.won,
            "thinking_tokens": round(self.thinking_tokens, 3),
            "forced_tokens": round(statistics.fmean(self.forced), 3),
            "generated_tokens": round(statistics.fmean(self.generated), 3),
            "saved": round(self.saved, 6),
            "most_over_budget": self.most_over_budget,
            "cut_off": self.cut_off,
            "seconds": round(self.seconds, 2),
            "reasons": self.reasons,
        }


def budgets_for(thought: Sequence[int]) -> list[int]:
    """Budgets that show the whole curve of a model that thinks that long by itself, 0 among them."""
    largest = max(sorted(thought)[math.ceil(len(thought) * LARGEST_SHARE) - 1], NUM_BUDGETS)
    steps = NUM_BUDGETS - 2
    ratio = SMALLEST_SHARE ** (1 / steps)
    return sorted({0, *(round(largest / ratio**i) for i in range(steps + 1))})


def setting(rule: str, threshold: float | None, boundary: Any = "sentence", alpha: float = 0.25) -> Setting:
    """The configuration of a rule at a threshold: a budget in tokens, margin's, entropy's (the mean, in nats; its
    variance is left free) or the probe's tau, or the loop's times.
    """
    from qwenopt.runtime.thinking import ThinkingConfig
    from qwenopt.runtime.thinking_exits import EntropyRule, LoopRule, MarginRule, ProbeRule

    if threshold is None:
        return Setting("unlimited", None, ThinkingConfig())
    if rule == "budget":
        return Setting(rule, int(threshold), ThinkingConfig(int(threshold)))
    exits: dict[str, Callable[[], Any]] = {
        "margin": lambda: MarginRule(threshold, boundary=boundary),
        "loop": lambda: LoopRule(int(threshold), boundary=boundary),
        "entropy": lambda: EntropyRule(threshold, variance=1e6, alpha=alpha, boundary=boundary),
        "probe": lambda: ProbeRule(threshold, boundary=boundary),
    }
    return Setting(rule, threshold, ThinkingConfig(exits=(exits[rule](),)))


def measure(
    one: Setting,
    generate: Callable[..., Any],
    is_right: Callable[[int, list[int]], bool],
    stop_ids: frozenset[int],
) -> Point:
    """Answer all questions under a setting. generate: from a ThinkingConfig to a GenerateOutput of all questions;
    is_right: from a question's number and its reply's tokens.
    """
    start = time.perf_counter()
    out = generate(one.config)
    seconds = time.perf_counter() - start
    limit = one.config.budget
    thought = [stats.tokens for stats in out.thinking]
    return Point(
        one.rule,
        one.threshold,
        [is_right(i, reply) for i, reply in enumerate(out.replies)],
        thought,
        [stats.forced_tokens for stats in out.thinking],
        [len(reply) for reply in out.replies],
        dict(sorted(Counter(stats.reason for stats in out.thinking).items())),
        sum(reply[-1] not in stop_ids for reply in out.replies),
        seconds,
        most_over_budget=None if limit is None else max(0, max(thought) - limit),
    )


def choose(points: Sequence[Point], unlimited: Point, tolerance: float = TOLERANCE) -> dict[str, Any] | None:
    """Of one rule's points, the one that thinks least at an accuracy no more than `tolerance` below unlimited.

    It is chosen on every other question, and its figures are those of the remaining ones, so that the choice does not
    flatter them. None where no point is good enough.
    """

    def mean(values: Sequence[float], part: int) -> float:
        return statistics.fmean(values[part::2])

    if len(unlimited.right) < 2:
        return None
    floor = mean(unlimited.right, 0) - tolerance - _EPSILON
    good = [p for p in points if mean(p.right, 0) >= floor]
    if not good:
        return None
    best = min(good, key=lambda p: mean(p.thought, 0))
    return {
        "rule": best.rule,
        "threshold": best.threshold,
        "questions": len(best.right[1::2]),
        "accuracy": round(mean(best.right, 1), 6),
        "unlimited_accuracy": round(mean(unlimited.right, 1), 6),
        "thinking_tokens": round(mean(best.thought, 1), 3),
        "unlimited_thinking_tokens": round(mean(unlimited.thought, 1), 3),
        "saved": round(1 - mean(best.thought, 1) / max(mean(unlimited.thought, 1), _EPSILON), 6),
    }


def to_csv(points: Sequence[Point]) -> str:
    """A line for each point, under a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(point.to_dict() for point in points)
    return text.getvalue()
