"""steps  ->  where each intermediate result lies in the arena, and after which steps all threads must meet"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from qwenopt.ops.steps import Buffer, Step

ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """Offset of every arena buffer, in bytes, and the size of the arena."""

    offsets: dict[Buffer, int]
    nbytes: int


def lay_out(steps: Sequence[Step], outside: Collection[Buffer]) -> Layout:
    """Give every buffer that is not `outside` a place for as long as it is used: first fit, lowest address.

    A place is free again two steps after its last use, not one: the next step may run without a barrier before it, and
    would need one if it wrote there.
    """
    last: dict[Buffer, int] = {}
    for i, step in enumerate(steps):
        for buffer in (*step.reads, *step.writes):
            last[buffer] = i
    offsets: dict[Buffer, int] = {}
    taken: list[tuple[int, int, int]] = []  # begin, end, last use
    nbytes = 0
    for i, step in enumerate(steps):
        taken = [place for place in taken if place[2] + 2 > i]
        for buffer in step.writes:
            if buffer in offsets or buffer in outside:
                continue
            size = max(-(-(buffer.nbytes or 0) // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
            begin = _first_gap(taken, size)
            offsets[buffer] = begin
            taken.append((begin, begin + size, last[buffer]))
            nbytes = max(nbytes, begin + size)
    return Layout(offsets, nbytes)


def _first_gap(taken: Iterable[tuple[int, int, int]], size: int) -> int:
    at = 0
    for begin, end, _ in sorted(taken):
        if begin - at >= size:
            return at
        at = max(at, end)
    return at


def barriers(steps: Sequence[Step], layout: Layout, read_only: Collection[Buffer]) -> list[bool]:
    """Whether a barrier follows each step: only where the next ones touch what those since the last barrier wrote, or
    write what they read.

    Tensors from outside may share memory, so a write to one is taken for a write to all, but for those that nobody
    writes to (`read_only`: parameters of an inference graph, see plan_run).
    """

    def spans(buffers: Iterable[Buffer]) -> set[tuple[int, int]]:
        found = set()
        for buffer in buffers:
            if buffer in layout.offsets:
                begin = layout.offsets[buffer]
                found.add((begin, begin + (buffer.nbytes or 0)))
            elif buffer not in read_only:
                found.add((-2, -1))  # all the outside is one place
        return found

    result = [False] * len(steps)
    since: list[tuple[Step, set[tuple[int, int]], set[tuple[int, int]]]] = []
    for i, step in enumerate(steps):
        reads, writes = spans(step.reads), spans(step.writes)
        for other, other_reads, other_writes in since:
            if step.serial and other.serial:
                continue
            if _meet(writes, other_reads | other_writes) or _meet(reads, other_writes):
                result[i - 1] = True
                since = []
                break
        since.append((step, reads, writes))
    return result


def _meet(a: Iterable[tuple[int, int]], b: Iterable[tuple[int, int]]) -> bool:
    return any(x[0] < y[1] and y[0] < x[1] for x in a for y in b)
