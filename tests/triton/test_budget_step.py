"""budget_step's kernel, interpreted: the tokens and the state of the reference, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qwenopt.ops.budget_state import NO_ID, RING, WIDTH, Bit, Column, Id, Phase, Reason, Signal
from qwenopt.ops.budget_step import budget_step as reference
from qwenopt.ops.triton.budget_layout import layout
from qwenopt.runtime.thinking_state import ThinkingState
from qwenopt.testing.budget_rows import random_rows
from qwenopt.testing.interpreted import Run
from qwenopt.testing.thinking_streams import Streams, demo_vocabulary, random_config

SIGNALS = (0.05, 0.2, 0.45, 0.55, 0.7, 0.1)


def in_programs_of(run: Run, rows: int, args: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What the kernel gives with so many rows in a program: tokens and state."""
    out, (_, _, *after) = run("budget_step.laid_out_step", layout(), rows, *args)
    for i, (found, given) in enumerate(zip(after, args, strict=True)):
        assert i == 2 or torch.equal(found, given), "only the state is written"
    return out, after[2]


def check(run: Run, rows: int, args: list[Tensor]) -> None:
    out, state = in_programs_of(run, rows, args)
    expected = [a.clone() for a in args]
    assert torch.equal(out, reference(*expected))
    wrong = (state != expected[2]).nonzero()
    assert not len(wrong), f"row {wrong[0, 0]}, column {int(wrong[0, 1])}"


@pytest.mark.parametrize("seed", range(20))
def test_random_rows(run: Run, seed: int) -> None:
    check(run, 64, random_rows(seed))


def test_one_row_in_a_program_as_on_a_device(run: Run) -> None:
    args = random_rows(0)
    out, (_, _, state, *_) = run("budget_step", *args)
    assert torch.equal(out, reference(*args))
    assert torch.equal(state, args[2])


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_few_rows(run: Run, rows: int) -> None:
    args = random_rows(1)
    check(run, 4, [a[:rows] for a in args[:4]] + args[4:])


def test_numbers_at_their_ends(run: Run) -> None:
    args = random_rows(2)
    args[0][:4] = torch.tensor([2**31 - 1, -(2**31), -1, 46])
    args[1][:, 1] = torch.tensor([0.0, -0.0, torch.inf, 1e-45]).repeat(16)
    state = args[2]
    state[:, Column.PHASE] = torch.tensor([Phase.THINK, Phase.THINK, Phase.ANSWER, Phase.FORCE]).repeat(16)
    state[8:16, Column.USED] = 2**31 - 1
    state[:, Column.FPTR] = torch.tensor([-9, 0, 11, 99]).repeat(16)
    state[:, Column.ENTROPY_AT] = 255
    check(run, 64, args)


def test_the_ring_begins_anew_where_it_ends(run: Run) -> None:
    args = random_rows(0)
    args[0][:] = torch.arange(20, 20 + 64) % 27 + 20
    state = args[2]
    state[:, Column.PHASE], state[:, Column.CTRL], state[:, Column.LOOP_AT] = Phase.THINK, 0, 255
    for column in (Column.BUDGET, Column.RESERVE_AT, Column.WINDOW_AT):
        state[:, column] = -1
    for column in (Column.MARGIN_AT, Column.ENTROPY_AT, Column.PROBE_AT):
        state[:, column] = 0
    state[:, Column.LOOP_TIMES], state[:, Column.LOOP_NEXT] = 99, torch.tensor([RING - 1, -1, RING, -70]).repeat(16)
    args[4][:] = 128
    check(run, 64, args)
    after = [a.clone() for a in args]
    reference(*after)
    assert after[2][:4, Column.LOOP_NEXT].tolist() == [0, 0, 1, RING - 5]


def test_averages_are_rounded_after_each_product(run: Run) -> None:
    torch.manual_seed(5)
    args = random_rows(3)
    state = args[2]
    state[:, Column.PHASE], state[:, Column.USED], state[:, Column.MIN] = Phase.THINK, 9, 0
    state[:, Column.ENTROPY_AT] = state[:, Column.LAST] = 255
    state[:, Column.ENTROPY_COUNT] = 3
    check(run, 64, args)
    entropy, mean, alpha = (
        x.double()
        for x in (
            args[1][:, 1],
            *(state[:, c].contiguous().view(torch.float32) for c in (Column.ENTROPY_MEAN, Column.ENTROPY_ALPHA)),
        )
    )
    fused = (alpha * entropy + (1 - alpha).float() * mean).float()
    plain = (alpha * entropy).float() + ((1 - alpha).float() * mean).float()
    assert not torch.equal(fused, plain), "here it makes a difference"


@pytest.fixture(scope="module")
def played() -> list[Tensor]:
    """The arguments of each step of 150 random streams under random configurations, by the reference."""
    return [torch.cat(parts) for parts in zip(*_steps(rounds=6, rows=25, steps=90), strict=True)]


def _steps(rounds: int, rows: int, steps: int) -> Iterator[list[Tensor]]:
    tokenizer, tokens = demo_vocabulary()
    streams = Streams(tokens, tokenizer)
    for seed in range(rounds):
        rng = random.Random(seed)
        thinking = ThinkingState(rows, tokens, signals=("margin", "entropy"), probe=lambda h: h[:, 0], max_forced=96)
        sources = [streams.stream(rng) for _ in range(rows)]
        for row in range(rows):
            thinking.admit(row, random_config(rng), streams.prompt(rng), rng.choice([steps, 50]))
        for _ in range(steps):
            if rng.random() < 0.1:
                thinking.end_now(rng.randrange(rows))
            tokens_now = [next(source) for source in sources]
            sampled = torch.tensor([NO_ID if rng.random() < 0.1 else token for token in tokens_now])
            signals = torch.tensor([rng.choices(SIGNALS, k=3) for _ in range(rows)])
            yield [sampled, signals, thinking.state.clone(), thinking.forced.clone()]
            reference(sampled, signals, thinking.state, thinking.forced, thinking.lut, thinking.ids)


def test_streams_under_random_configurations(run: Run, played: list[Tensor]) -> None:
    """Each step begins where the reference left off: equal steps make equal streams."""
    thinking = ThinkingState(1, demo_vocabulary()[1])
    check(run, 2048, [*played, thinking.lut, thinking.ids])
    # Streams in which nothing happens would prove nothing.
    reasons = set(played[2][:, Column.REASON].tolist())
    assert reasons == {int(reason) for reason in Reason}
    phases = set(played[2][:, Column.PHASE].tolist())
    assert phases == {int(phase) for phase in Phase if phase != Phase.OFF}


def _permuted(args: list[Tensor], order: Tensor) -> list[Tensor]:
    state = args[2].clone()
    state[:, : WIDTH - RING] = args[2][:, order]
    return [*args[:2], state, *args[3:]]


def test_columns_are_where_budget_state_says(run: Run) -> None:
    """The kernel has no numbers of its own: of another numbering it makes another kernel."""
    from qwenopt.triton_kernels.budget_layout import Names

    args = random_rows(4)
    order = torch.arange(WIDTH - RING).flip(0)  # column c moves to 63 - c; the four ids keep their order
    ids = slice(int(Column.IMPLICIT), int(Column.GUARD))
    flipped = {c.name: WIDTH - RING - 1 - int(c) for c in Column} | {"IMPLICIT": WIDTH - RING - int(Column.GUARD)}
    order[WIDTH - RING - int(Column.GUARD) : WIDTH - RING - int(Column.IMPLICIT)] = torch.arange(ids.start, ids.stop)
    other = layout()._replace(column=Names(flipped))
    out, (_, _, _, _, state, *_) = run("budget_step.laid_out_step", other, 64, *_permuted(args, order))
    assert torch.equal(out, reference(*args))
    assert torch.equal(state, _permuted(args, order)[2])
    assert not torch.equal(args[2], _permuted(args, order)[2])
    assert other != layout()


def test_a_kernel_is_kept_by_every_number() -> None:
    text = str(layout())
    for names in (Column, Phase, Reason, Bit, Id, Signal):
        for name, member in names.__members__.items():
            assert f"'{name}': {int(member)}" in text
