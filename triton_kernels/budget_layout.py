"""The numbers that the kernels of budget_step and budget_guard are compiled for, given with each call.

They are made from the enums of `qwenopt.ops.budget_state`, the only place where columns, phases and the rest are
numbered: a kernel reads `N.column.PHASE`, and another numbering makes another kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Names:
    """Numbers by name, each an attribute. Its text has them all: compiled kernels are kept by it, here and on disk."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self._text = repr(dict(numbers))
        self.__dict__.update(numbers)

    def __repr__(self) -> str:
        return self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Names) and self._text == other._text


class Layout(NamedTuple):
    """What stands where in a row of the state, in the ids that all rows share, in signals and in look-up bits."""

    column: Names
    phase: Names
    reason: Names
    bit: Names
    id: Names
    signal: Names
    num_signals: int
    width: int
    ring: int
    no_id: int
    max_grace: int
    max_implicit: int
    max_eos: int
    missing_shift: int
    hash_factor: int
    hash_mask: int
