"""Rules that end thinking early, from numbers that the decode step has anyway; all are off unless named.

Each is looked at only where the last token was a boundary of its kind, and only after `min_tokens` of thinking, at
least one. What a rule saves and costs depends on the model: measure before relying on one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qwenopt.ops.budget_state import Bit

ExitBoundary = Literal["any", "sentence", "newline", "paragraph"]
# A paragraph's end is also a line's and a sentence's.
BOUNDARY_BITS: dict[str, int] = {
    "none": 0,
    "utf8": Bit.ANY,
    "any": Bit.ANY,
    "sentence": Bit.SENTENCE | Bit.NEWLINE | Bit.PARAGRAPH,
    "newline": Bit.NEWLINE | Bit.PARAGRAPH,
    "paragraph": Bit.PARAGRAPH,
}


@dataclass(frozen=True)
class MarginRule:
    """`</think>` is nearly the likeliest token: at most `tau` below the largest logit, at `patience` boundaries in a
    row. (ThinkBrake, arXiv 2510.00546.)
    """

    tau: float = 0.25
    patience: int = 1
    boundary: ExitBoundary = "sentence"

    def __post_init__(self) -> None:
        _check(self, ("tau",), ("patience",))

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


@dataclass(frozen=True)
class LoopRule:
    """The last tokens (about 16) at this boundary were there at `times` of the last 64, this one included."""

    times: int = 4
    boundary: ExitBoundary = "sentence"

    def __post_init__(self) -> None:
        _check(self, (), ("times",))
        if not 2 <= self.times <= 64:
            raise ValueError(f"LoopRule: times {self.times}; it must be 2..64")

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


@dataclass(frozen=True)
class EntropyRule:
    """The entropy of the next token, in nats, has settled: over boundaries, its moving mean (weight `alpha`) is below
    `mean` and its moving variance below `variance`, after at least 4 / alpha boundaries. (After EAT, arXiv 2509.26522,
    which asks the entropy behind an appended `</think>`; this is the running one, cheaper and weaker. Experimental.)
    """

    mean: float = 0.5
    variance: float = 0.05
    alpha: float = 0.1
    boundary: ExitBoundary = "paragraph"

    def __post_init__(self) -> None:
        _check(self, ("mean", "variance", "alpha"), ())
        if not 0 < self.alpha <= 1:
            raise ValueError(f"EntropyRule: alpha {self.alpha}; it must be more than 0 and at most 1")

    @property
    def after(self) -> int:
        """Boundaries before the averages are trusted."""
        return math.ceil(4 / self.alpha)

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


@dataclass(frozen=True)
class ProbeRule:
    """The probe's score of the hidden state is above `tau` at `patience` boundaries in a row.

    The probe itself is given to `ThinkingState(probe=...)`: a module from hidden [R, N] to a score [R].
    """

    tau: float = 0.9
    patience: int = 1
    boundary: ExitBoundary = "paragraph"

    def __post_init__(self) -> None:
        _check(self, ("tau",), ("patience",))

    def to_dict(self) -> dict[str, Any]:
        return _to_dict(self)


ExitRule = MarginRule | LoopRule | EntropyRule | ProbeRule
EXIT_RULES: dict[str, type[Any]] = {
    "margin": MarginRule,
    "loop": LoopRule,
    "entropy": EntropyRule,
    "probe": ProbeRule,
}


def exit_from_dict(values: Any) -> ExitRule:
    """The rule that `to_dict` wrote: its name under "rule", and its fields."""
    if isinstance(values, ExitRule):
        return values
    fields = dict(values)
    name = fields.pop("rule", None)
    if name not in EXIT_RULES:
        raise ValueError(f"exit rule {name!r}; it must be one of {sorted(EXIT_RULES)}")
    rule: ExitRule = EXIT_RULES[name](**fields)
    return rule


def _to_dict(rule: Any) -> dict[str, Any]:
    name = next(name for name, kind in EXIT_RULES.items() if isinstance(rule, kind))
    return {"rule": name, **dataclasses.asdict(rule)}


def _check(rule: Any, numbers: tuple[str, ...], counts: tuple[str, ...]) -> None:
    kind = type(rule).__name__
    for name in numbers:
        value = getattr(rule, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{kind}: {name} {value!r}; it must be a finite number")
    for name in counts:
        value = getattr(rule, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{kind}: {name} {value!r}; it must be an int of at least 1")
    if rule.boundary not in get_args(ExitBoundary):
        raise ValueError(f"{kind}: boundary {rule.boundary!r}; it must be one of {get_args(ExitBoundary)}")
