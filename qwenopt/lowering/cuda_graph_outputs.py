"""How the results of a captured call reach the caller: as copies, or as views of the caller's own tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwenopt.lowering.cuda_graph_inputs import storage_begin

ALONE = -1


@dataclass(frozen=True)
class _View:
    """A result that lies in the memory of input `index`, `offset` elements behind its first."""

    index: int
    offset: int


@dataclass(frozen=True)
class Outputs:
    """For each result: the input that it is a view of, or the number of the memory that it shares with others.

    None is for what is no tensor; `ALONE` for what is copied whatever it shares.
    """

    places: tuple[_View | int | None, ...]

    @classmethod
    def of(cls, results: Sequence[Any], given: Sequence[Any], inputs: Sequence[int]) -> Outputs:
        """Sort the results of a call; `given` are its arguments; those numbered `inputs` may be seen in the results."""
        owner = {storage_begin(given[i]): i for i in inputs}
        groups: dict[tuple[int, torch.dtype], int] = {}
        return cls(tuple(_place(result, given, owner, groups) for result in results))

    def to_caller(self, results: Sequence[Any], args: Sequence[Any], *, copy: bool) -> tuple[Any, ...]:
        """The results for a call with `args`; copies of what the next call overwrites, if `copy`."""
        shared: dict[int, Tensor] = {}
        out: list[Any] = []
        for place, result in zip(self.places, results, strict=True):
            if isinstance(place, _View):
                mine = args[place.index]
                out.append(mine.as_strided(result.shape, result.stride(), mine.storage_offset() + place.offset))
            elif place is None or not (copy or place == ALONE):
                out.append(result)
            elif place == ALONE or self.places.count(place) == 1:
                out.append(result.clone())
            else:
                if place not in shared:
                    shared[place] = _whole(result).clone()
                out.append(shared[place].as_strided(result.shape, result.stride(), result.storage_offset()))
        return tuple(out)


def _place(
    result: Any, given: Sequence[Any], owner: Mapping[int, int], groups: dict[tuple[int, torch.dtype], int]
) -> _View | int | None:
    if not isinstance(result, Tensor):
        return None
    if not result.numel():
        return ALONE
    begin = storage_begin(result)
    if begin not in owner:
        return groups.setdefault((begin, result.dtype), len(groups))
    source = given[owner[begin]]
    if source.dtype != result.dtype:
        return ALONE
    return _View(owner[begin], (result.data_ptr() - source.data_ptr()) // source.element_size())


def _whole(t: Tensor) -> Tensor:
    """All of the memory that a tensor lies in, in elements of its dtype."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
