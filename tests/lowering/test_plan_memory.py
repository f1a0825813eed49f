"""Where a plan's results lie and where its threads meet: whatever the threads' pace, the results are those in order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from qwenopt.lowering.plan_memory import ALIGNMENT, Layout, barriers, lay_out
from qwenopt.ops.steps import Buffer, Step

OUTSIDE_BYTES = 8  # of every tensor that is not in the arena
MEMBERS = 2


def step(reads: Sequence[Buffer], writes: Sequence[Buffer], *, serial: bool = False) -> Step:
    return Step("step", (), tuple(reads), tuple(writes), serial)


# --- An interpreter: what steps do to memory, in order or by members of a team that only meet at barriers. ---


class Memory:
    """The arena and the tensors outside it: all that may be written to are one (the worst that aliases can be)."""

    def __init__(self, layout: Layout | None, read_only: set[Buffer]) -> None:
        self.layout, self.read_only = layout, read_only
        self.arena = [0] * (layout.nbytes if layout else 0)
        self.apart: dict[Buffer, list[int]] = {}  # without a layout every buffer has memory of its own
        self.outside, self.constant = list(range(OUTSIDE_BYTES)), list(range(OUTSIDE_BYTES))

    def place(self, buffer: Buffer) -> tuple[list[int], int, int]:
        """The memory that the buffer lies in, and from where to where."""
        if buffer in self.read_only:
            return self.constant, 0, OUTSIDE_BYTES
        if buffer.nbytes is None:
            return self.outside, 0, OUTSIDE_BYTES
        if self.layout is None:
            return self.apart.setdefault(buffer, [0] * buffer.nbytes), 0, buffer.nbytes
        begin = self.layout.offsets[buffer]
        return self.arena, begin, begin + buffer.nbytes


def run_share(memory: Memory, number: int, step: Step, member: int, members: int) -> None:
    """Write this member's share of each result: its old value, where it is read too, and all else that is read."""
    if step.serial:
        if member > 0:
            return
        members = 1
    written = [memory.place(b)[0] for b in step.writes if b.nbytes is None]
    elsewhere = [b for b in step.reads if b not in step.writes and not any(memory.place(b)[0] is w for w in written)]
    read = tuple(tuple(data[begin:end]) for data, begin, end in map(memory.place, elsewhere))
    for buffer in step.writes:
        data, begin, end = memory.place(buffer)
        size = end - begin
        for i in range(begin + size * member // members, begin + size * (member + 1) // members):
            data[i] = hash((number, i - begin, read, data[i] if buffer in step.reads else 0))


def in_order(steps: Sequence[Step], read_only: set[Buffer]) -> list[int]:
    memory = Memory(None, read_only)
    for number, step in enumerate(steps):
        run_share(memory, number, step, 0, 1)
    return memory.outside


def by_a_team(
    steps: Sequence[Step], layout: Layout, meet: Sequence[bool], read_only: set[Buffer], seed: int
) -> list[int]:
    """One of the ways in which the members can be ahead of each other: member 0, member 1, or a throw of dice."""
    memory, dice = Memory(layout, read_only), random.Random(seed)
    at = [0] * MEMBERS

    def waits(member: int) -> bool:
        """Whether the member stands at a barrier that another has yet to reach, or at the end."""
        if at[member] == len(steps):
            return True
        passed = [i for i in range(at[member]) if meet[i]]
        return bool(passed) and min(at) <= passed[-1]

    while min(at) < len(steps):
        free = [m for m in range(MEMBERS) if not waits(m)]
        member = free[seed % len(free)] if seed < MEMBERS else dice.choice(free)
        run_share(memory, at[member], steps[at[member]], member, MEMBERS)
        at[member] += 1
    return memory.outside


def differs(steps: Sequence[Step], layout: Layout, meet: Sequence[bool], read_only: set[Buffer] = frozenset()) -> bool:
    wanted = in_order(steps, read_only)
    return any(by_a_team(steps, layout, meet, read_only, seed) != wanted for seed in range(8))


# --- Steps at random. ---


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Step], set[Buffer], set[Buffer]]:
    """Steps, the buffers outside the arena, and those of them that nobody writes to."""
    outside, parameters = [Buffer(), Buffer()], [Buffer(), Buffer()]
    written: list[Buffer] = []
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        # The newest results are the likeliest to be read, as in a model.
        known = [*parameters, *outside, *written, *written[-2:], *written[-2:]]
        reads = draw(st.lists(st.sampled_from(known), max_size=3, unique=True))
        kind = draw(st.sampled_from(["new", "new", "new", "scratch", "outside", "in place"]))
        made = [Buffer(draw(st.sampled_from([1, 2, 63, 64, 65, 200]))) for _ in range(1 + (kind == "scratch"))]
        if kind == "outside":
            made = [draw(st.sampled_from(outside))]
        elif kind == "in place" and written:
            made = [draw(st.sampled_from(written))]
        written += [b for b in made if b.nbytes is not None and b not in written]
        steps.append(step(reads, made, serial=draw(st.booleans()) and kind != "scratch"))
    alive = [b for b in written if b.nbytes is not None]
    steps.append(step(draw(st.lists(st.sampled_from(alive), unique=True)) if alive else [], outside[:1]))
    return steps, {*outside, *parameters}, set(parameters)


def places_of_live_buffers(steps: Sequence[Step], layout: Layout, i: int) -> list[tuple[int, int]]:
    """Where the buffers lie that are written up to step i and used from it on."""
    alive = set()
    for buffer in layout.offsets:
        uses = [n for n, s in enumerate(steps) if buffer in (*s.reads, *s.writes)]
        if min(uses) <= i <= max(uses):
            alive.add((layout.offsets[buffer], layout.offsets[buffer] + (buffer.nbytes or 0)))
    return sorted(alive)


@given(programs())
def test_buffers_that_are_alive_at_once_lie_apart(program: tuple[list[Step], set[Buffer], set[Buffer]]) -> None:
    steps, outside, _ = program
    layout = lay_out(steps, outside)
    assert set(layout.offsets) == {b for s in steps for b in s.writes} - outside
    for buffer, begin in layout.offsets.items():
        assert begin % ALIGNMENT == 0
        assert begin + (buffer.nbytes or 0) <= layout.nbytes
    for i in range(len(steps)):
        places = places_of_live_buffers(steps, layout, i)
        assert all(a[1] <= b[0] for a, b in zip(places, places[1:], strict=False)), f"at step {i}: {places}"


@given(programs())
def test_a_team_gets_what_one_thread_gets_in_order(program: tuple[list[Step], set[Buffer], set[Buffer]]) -> None:
    steps, outside, read_only = program
    layout = lay_out(steps, outside)
    assert not differs(steps, layout, barriers(steps, layout, read_only), read_only)


# --- Steps by hand. ---


def chain(length: int, nbytes: int = 64) -> tuple[list[Step], list[Buffer], Buffer]:
    """Each step reads what the one before wrote; the last result goes outside."""
    made, out = [Buffer(nbytes) for _ in range(length)], Buffer()
    return [step([a], [b]) for a, b in zip([Buffer(), *made], [*made, out], strict=True)], made, out


def test_a_chain_meets_after_every_step_but_the_last() -> None:
    steps, _, out = chain(5)
    first = steps[0].reads[0]
    assert barriers(steps, lay_out(steps, {out, first}), {first}) == [True] * 5 + [False]


def test_every_barrier_of_a_chain_is_needed() -> None:
    """The interpreter sees a barrier that is gone."""
    steps, _, out = chain(5)
    first = steps[0].reads[0]
    layout = lay_out(steps, {out, first})
    meet = barriers(steps, layout, {first})
    assert not differs(steps, layout, meet, {first})
    for gone in range(5):
        assert differs(steps, layout, [m and i != gone for i, m in enumerate(meet)], {first}), f"barrier {gone}"


def test_live_buffers_that_overlap_are_seen() -> None:
    """The interpreter sees two results in one place, barriers or not."""
    a, b, out = Buffer(64), Buffer(64), Buffer()
    steps = [step([], [a]), step([], [b]), step([a, b], [out])]
    layout = lay_out(steps, {out})
    assert not differs(steps, layout, [True] * 3)
    overlapping = replace(layout, offsets={a: 0, b: 32})
    assert differs(steps, overlapping, [True] * 3)


def test_a_place_is_used_again_two_steps_later() -> None:
    steps, made, out = chain(6, nbytes=100)
    layout = lay_out(steps, {out, steps[0].reads[0]})
    assert layout.nbytes < 6 * 128
    assert layout.offsets[made[0]] == layout.offsets[made[3]]
    assert len({layout.offsets[b] for b in made[:3]}) == 3


def test_independent_steps_do_not_meet() -> None:
    x, a, b, c = Buffer(), Buffer(64), Buffer(64), Buffer(64)
    steps = [step([x], [a]), step([x], [b]), step([x], [c]), step([a, b, c], [Buffer(64)])]
    assert barriers(steps, lay_out(steps, {x}), set()) == [False, False, True, False]


def test_a_write_waits_for_those_who_read() -> None:
    a, b = Buffer(64), Buffer(64)
    steps = [step([], [a]), step([a], [b]), step([], [a])]
    assert barriers(steps, lay_out(steps, set()), set()) == [True, True, False]


def test_a_write_waits_for_a_write() -> None:
    a, b = Buffer(64), Buffer(64)
    assert barriers([step([], [a]), step([], [a])], lay_out([step([], [a])], set()), set()) == [True, False]
    assert barriers([step([], [a]), step([], [b])], Layout({a: 0, b: 32}, 96), set()) == [True, False]


def test_a_barrier_counts_for_all_steps_before_it() -> None:
    a, b, c, d = (Buffer(64) for _ in range(4))
    steps = [step([], [a]), step([], [b]), step([a], [c]), step([b], [d])]
    assert barriers(steps, lay_out(steps, set()), set()) == [False, True, False, False]


def test_serial_steps_follow_each_other_without_a_barrier_but_nobody_else() -> None:
    a, b = Buffer(8), Buffer(8)
    serial = [step([], [a], serial=True), step([a], [b], serial=True)]
    layout = lay_out(serial, set())
    assert barriers(serial, layout, set()) == [False, False]
    for i in range(2):
        mixed = [replace(s, serial=s.serial and n != i) for n, s in enumerate(serial)]
        assert barriers(mixed, layout, set()) == [True, False]


def test_tensors_from_outside_may_be_one() -> None:
    cache, keys, parameter, a = Buffer(), Buffer(), Buffer(), Buffer(64)
    write, read = step([], [cache]), step([keys], [a])
    layout = lay_out([write, read], {cache, keys})
    assert barriers([write, read], layout, set()) == [True, False]
    assert barriers([read, write], layout, set()) == [True, False]
    assert barriers([write, step([parameter], [a])], layout, {parameter}) == [False, False]
