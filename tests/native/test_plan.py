"""Plans: what they refuse, what a failing step leaves undone, and the steps that only plans have, against torch."""

import struct

import pytest
import torch

from qwenopt import native

THREADS = [1, 2, 4]


def step(name, *operands, barrier=True):
    """A step of constants; a float goes in as the bits of a double, a tuple as (slot, scale, offset)."""
    encoded = []
    for o in operands:
        if isinstance(o, float):
            o = struct.unpack("<q", struct.pack("<d", o))[0]
        elif isinstance(o, torch.Tensor):
            o = o.data_ptr()
        encoded.append(o if isinstance(o, tuple) else (-1, 0, o))
    return name, encoded, barrier


def plan(*steps, num_values=0):
    return native.C().Plan(list(steps), num_values)


def advance(counter, value=1):
    return step("advance", counter, counter.numel(), value)


def move(to, source, positions=None, first=0):
    """The operands of move_rows for tensors [B, G, rows, D]."""
    b, g, s, d = source.shape
    size = source.element_size()
    strides = [stride * size for stride in (*to.stride()[:3], *source.stride()[:3])]
    at = 0 if positions is None else positions.data_ptr()
    return (to.data_ptr(), source.data_ptr(), at, first, b, g, s, to.shape[2], d * size, *strides)


def test_unknown_op_is_named():
    with pytest.raises(ValueError, match="plan: step nothing; there is no op of that name"):
        plan(step("nothing", 1))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_number_of_operands_is_named(count):
    with pytest.raises(ValueError, match=f"plan: step advance with {count} operands; it takes 3"):
        plan(step("advance", *range(count)))


@pytest.mark.parametrize("slot", [-2, 2, 1 << 20])
def test_wrong_slot_is_named(slot):
    with pytest.raises(ValueError, match=f"plan: step advance: slot {slot}; there are 2 values"):
        plan(step("advance", (slot, 1, 0), 1, 1), num_values=2)


@pytest.mark.parametrize("given", [0, 1, 3])
def test_wrong_number_of_values_is_named(given):
    counter = torch.zeros(1, dtype=torch.int64)
    made = plan(advance(counter), num_values=2)
    for call in (made.run, made.profile):
        with pytest.raises(ValueError, match=f"plan: {given} values; it was made for 2"):
            call([0] * given, 1)
    assert counter.item() == 0


def test_threads_are_checked():
    with pytest.raises(ValueError, match="plan: 0 threads; threads must be at least 1"):
        plan().run([], 0)


@pytest.mark.parametrize("threads", THREADS)
def test_no_steps(threads):
    empty = plan()
    assert (empty.num_steps, empty.num_barriers) == (0, 0)
    assert empty.run([], threads) is None
    assert empty.profile([], threads) == []


def test_operands_follow_the_values():
    """offset + scale * value, for an address and for a size."""
    out = torch.full((20,), -1)
    made = plan(step("count_from", (0, 1, 16), 0, (1, 3, 2)), num_values=2)
    made.run([out.data_ptr(), 4], 2)
    assert out.tolist() == [-1, -1, *range(14), -1, -1, -1, -1]
    made.run([out.data_ptr() + 8, 0], 2)
    assert out.tolist()[:6] == [-1, -1, 0, 0, 1, 3]


@pytest.mark.parametrize("threads", THREADS)
def test_nothing_runs_when_a_later_step_gets_wrong_arguments(threads):
    counter, out = torch.zeros(3, dtype=torch.int64), torch.full((4,), -1)
    made = plan(advance(counter), step("count_from", out, 0, (0, 1, 0)), num_values=1)
    with pytest.raises(ValueError, match="count_from: count is -2; it must be at least 0"):
        made.run([-2], threads)
    assert counter.tolist() == [0, 0, 0]
    made.run([4], threads)
    assert (counter.tolist(), out.tolist()) == ([1, 1, 1], [0, 1, 2, 3])


def failing_move(large):
    """A move whose last row has no place, and where it would write; large enough for all threads, or not."""
    source = torch.randn(2, 4, 6, 600 if large else 8)
    to, positions = torch.zeros(2, 4, 9, source.shape[3]), torch.tensor([0, 1, 2, 3, 4, 9])
    return step("move_rows", *move(to, source, positions), barrier=False), (source, to, positions)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("large", [False, True], ids=["one thread", "all threads"])
def test_a_failing_step_stops_what_follows(threads, large):
    bad, (source, to, positions) = failing_move(large)
    before, after, out = (torch.zeros(2, dtype=torch.int64) for _ in range(3))
    x = torch.randn(64, 1024)
    normed = torch.zeros_like(x)
    norm = step("rms_norm", x, x, normed, 64, 1024, 1024, 1e-6, 0)
    made = plan(advance(before), bad, advance(after), norm, step("count_from", out, 0, 2))
    text = "move_rows: row 5 goes to position 9 of a cache of 9; positions must be 0..8: make the cache longer"
    for call in (made.run, made.profile):
        with pytest.raises(IndexError, match=text):
            call([], threads)
    assert before.tolist() == [2, 2]
    for written in (to, after, normed, out):
        assert not written.any()
    positions[5] = 8
    made.run([], threads)  # a failure is forgotten by the next run
    assert torch.equal(to[:, :, 8], source[:, :, 5])
    assert after.tolist() == [1, 1]
    assert normed.any()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("tokens", [2, 40])
def test_a_wrong_expert_id_stops_what_follows(threads, tokens):
    t, n, i, e, k = tokens, 64, 64, 4, 2
    x, weights = torch.randn(t, n), torch.rand(t, k)
    gate_up, down, indices = torch.randn(e, 2 * i, n), torch.randn(e, n, i), torch.zeros(t, k, dtype=torch.int64)
    out, after = torch.zeros(t, n), torch.zeros(1, dtype=torch.int64)
    scratch = torch.empty(native.C().moe_experts_scratch_bytes(t, n, i, e, k, 0, threads), dtype=torch.uint8)
    experts = step("moe_experts", x, indices, weights, gate_up, down, out, scratch, t, n, i, e, k, n, 0, barrier=False)
    made = plan(experts, advance(after))
    indices[-1, -1] = e + 1
    with pytest.raises(IndexError, match=r"moe_experts: expert id 5 of 4 experts; ids must be 0\.\.3"):
        made.run([], threads)
    assert not out.any()
    assert after.item() == 0
    indices[-1, -1] = e
    made.run([], threads)
    assert out.any(dim=1).all()
    assert after.item() == 1


# (B, G, S, L, D): one row, several, none, more bytes than one thread moves.
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 4, 9, 5), (1, 2, 0, 3, 4), (2, 5, 40, 64, 128)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("threads", THREADS)
def test_move_rows(shape, kind, threads):
    b, g, s, length, d = shape
    to, source = ((10 * torch.randn(b, g, n, d)).to(kind) for n in (length, s))
    wide = torch.zeros(b, s, g + 1, d + 3, dtype=kind)[:, :, 1:, 2 : d + 2]
    strided = wide.copy_(source.transpose(1, 2)).transpose(1, 2)
    positions = torch.randperm(length)[:s]
    expected = to.clone().index_copy_(2, positions, source)
    for rows in (source, strided):
        found = to.clone()
        native.C().move_rows(*move(found, rows, positions), threads)
        assert torch.equal(found, expected)
        found = to.clone()
        plan(step("move_rows", *move(found, rows, positions))).run([], threads)
        assert torch.equal(found, expected)
    first = length - s
    expected = torch.cat((to[:, :, :first], source), 2)
    native.C().move_rows(*move(to, source, first=first), threads)
    assert torch.equal(to, expected)


@pytest.mark.parametrize("at", [-1, 4, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("how", ["positions", "first"])
def test_rows_without_a_place_are_named(at, how):
    to, source = torch.zeros(1, 2, 4, 3), torch.ones(1, 2, 1, 3)
    where = {"positions": torch.tensor([at])} if how == "positions" else {"first": at}
    with pytest.raises(IndexError, match=rf"move_rows: row 0 goes to position {at} of a cache of 4; .* 0\.\.3"):
        native.C().move_rows(*move(to, source, **where), 2)
    assert not to.any()


@pytest.mark.parametrize("count", [0, 1, 7])
def test_count_from(count):
    for base in (None, 0, -3, 1 << 40):
        out, start = torch.full((8,), -7), torch.tensor([base or 0])
        native.C().count_from(out.data_ptr(), 0 if base is None else start.data_ptr(), count, 2)
        assert torch.equal(out[:count], torch.arange(count) + start)
        assert (out[count:] == -7).all()


@pytest.mark.parametrize("value", [0, 1, -5, 1 << 40])
def test_advance(value):
    counters = torch.tensor([3, -1, 0, 9])
    native.C().advance(counters.data_ptr(), 3, value, 2)
    assert torch.equal(counters, torch.tensor([3 + value, -1 + value, value, 9]))


@pytest.mark.parametrize("threads", THREADS)
def test_choose(threads):
    which, a, b = torch.rand(9) < 0.5, torch.arange(9), torch.arange(9) + 100
    for first, second in ((a, b), (a, -2), (7, b), (7, -2)):
        out = torch.full((9,), -7)
        addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else 0 for x in (first, second)]
        numbers = [x if isinstance(x, int) else 0 for x in (first, second)]
        plan(step("choose", which, *addresses, *numbers, out, 9)).run([], threads)
        assert torch.equal(out, torch.where(which, first, second))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("rows", "cols"), [(0, 3), (1, 5), (4, 2)])
def test_copy_rows(threads, rows, cols):
    to, source = torch.full((rows, 7), -1.0), torch.rand(rows, 5)
    wanted = to.clone()
    wanted[:, :cols] = source[:, :cols]
    plan(step("copy_rows", to, source, rows, 4 * cols, 28, 20)).run([], threads)
    assert torch.equal(to, wanted)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("count", "cols"), [(0, 3), (1, 5), (4, 2), (90, 400)])
def test_take_rows(threads, count, cols):
    source = torch.rand(7, cols + 2)[:, :cols]
    index, out = torch.randint(-7, 7, (count,)), torch.full((count, cols), -1.0)
    plan(step("take_rows", out, source, index, count, 7, 4 * cols, 4 * cols, 4 * (cols + 2))).run([], threads)
    assert torch.equal(out, source[index])


@pytest.mark.parametrize("bad", [7, -8, 1 << 40])
def test_rows_that_are_not_there_are_named(bad):
    out, index = torch.full((2, 3), -1.0), torch.tensor([1, bad])
    with pytest.raises(IndexError, match=rf"take_rows: index {bad} of 7 rows; indices must be -7\.\.6"):
        native.C().take_rows(*(t.data_ptr() for t in (out, torch.ones(7, 3), index)), 2, 7, 12, 12, 12, 2)
    assert (out == -1).all()


@pytest.mark.parametrize("threads", THREADS)
def test_profile_names_every_step_and_runs_them(threads):
    counter, x = torch.zeros(1, dtype=torch.int64), torch.randn(3, 8)
    out = torch.zeros_like(x)
    made = plan(advance(counter), step("rms_norm", x, x[0], out, 3, 8, 8, 1e-6, 0), advance(counter), advance(counter))
    spent = made.profile([], threads)
    assert [name for name, _ in spent] == ["advance", "rms_norm", "advance", "advance"]
    assert all(0 <= seconds < 60 for _, seconds in spent)
    assert counter.item() == 3
    assert out.any(dim=1).all()


def test_steps_and_barriers_are_counted():
    counter = torch.zeros(1, dtype=torch.int64)
    loose = step("advance", counter, 1, 1, barrier=False)
    assert plan(loose, advance(counter), loose).num_barriers == 1
    bad, _ = failing_move(False)
    assert plan(bad).num_barriers == 1, "a step that can fail is followed by a barrier, asked for or not"
