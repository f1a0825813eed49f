"""budget_step in Triton: a program takes a row (or several) a step further, with no branch and no host."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.budget_layout import Layout


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _thinking(phase, N: tl.constexpr):
    return (phase == N.phase.THINK) | (phase == N.phase.GRACE)


@triton.jit
def _one_of(token, ids, keep, COUNT: tl.constexpr):
    """Whether the token is one of the COUNT ids from `ids` on."""
    found = token != token
    for i in tl.static_range(COUNT):
        found |= token == tl.load(ids + i, mask=keep, other=0)
    return found


@triton.jit
def _patient(s, last, hit, allowed, keep, AT: tl.constexpr, PATIENCE: tl.constexpr, COUNT: tl.constexpr):
    """Whether `hit` held at as many boundaries in a row as the patience asks for; the count is written."""
    at, patience = tl.load(s + AT, mask=keep, other=0), tl.load(s + PATIENCE, mask=keep, other=0)
    count = tl.load(s + COUNT, mask=keep, other=0)
    now = allowed & ((last & at) != 0)
    count = tl.where(hit, count + 1, 0)
    tl.store(s + COUNT, count, mask=now)
    return now & (count >= patience)


@triton.jit
def _plateau(s, last, entropy, allowed, keep, N: tl.constexpr):
    """Whether the entropy's moving mean and variance at boundaries are both low, after enough of them."""
    C: tl.constexpr = N.column
    at, after = tl.load(s + C.ENTROPY_AT, mask=keep, other=0), tl.load(s + C.ENTROPY_AFTER, mask=keep, other=0)
    count = tl.load(s + C.ENTROPY_COUNT, mask=keep, other=0)
    alpha = _float(tl.load(s + C.ENTROPY_ALPHA, mask=keep, other=0))
    old_mean = _float(tl.load(s + C.ENTROPY_MEAN, mask=keep, other=0))
    old_var = _float(tl.load(s + C.ENTROPY_VAR, mask=keep, other=0))
    delta = _float(tl.load(s + C.ENTROPY_DELTA, mask=keep, other=0))
    eta = _float(tl.load(s + C.ENTROPY_ETA, mask=keep, other=0))
    now = allowed & ((last & at) != 0)
    mean = tl.where(count == 0, entropy, alpha * entropy + (1.0 - alpha) * old_mean)
    off = entropy - mean
    var = tl.where(count == 0, 0.0, alpha * (off * off) + (1.0 - alpha) * old_var)
    tl.store(s + C.ENTROPY_MEAN, mean.to(tl.int32, bitcast=True), mask=now)
    tl.store(s + C.ENTROPY_VAR, var.to(tl.int32, bitcast=True), mask=now)
    tl.store(s + C.ENTROPY_COUNT, count + 1, mask=now)
    return now & (var < delta) & (mean < eta) & (count + 1 >= after)


@triton.jit
def _reason(s, signals, phase, used, gen, last, keep, N: tl.constexpr):
    """Why the block must end now; 0 where it need not. Counts the boundaries of the rules, whichever wins."""
    C: tl.constexpr = N.column
    R: tl.constexpr = N.reason
    budget, ctrl = tl.load(s + C.BUDGET, mask=keep, other=0), tl.load(s + C.CTRL, mask=keep, other=0)
    least, pending = tl.load(s + C.MIN, mask=keep, other=0), tl.load(s + C.PENDING, mask=keep, other=0)
    reserve_at, window_at = tl.load(s + C.RESERVE_AT, mask=keep, other=0), tl.load(s + C.WINDOW_AT, mask=keep, other=0)
    boundary = tl.load(s + C.BOUNDARY, mask=keep, other=0)
    loop_at, loop_times = tl.load(s + C.LOOP_AT, mask=keep, other=0), tl.load(s + C.LOOP_TIMES, mask=keep, other=0)
    loop_hits = tl.load(s + C.LOOP_HITS, mask=keep, other=0)
    margin_tau = _float(tl.load(s + C.MARGIN_TAU, mask=keep, other=0))
    probe_tau = _float(tl.load(s + C.PROBE_TAU, mask=keep, other=0))
    margin = tl.load(signals + N.signal.MARGIN, mask=keep, other=0.0) <= margin_tau
    entropy = tl.load(signals + N.signal.ENTROPY, mask=keep, other=0.0)
    probe = tl.load(signals + N.signal.PROBE, mask=keep, other=0.0) > probe_tau

    allowed = (phase == N.phase.THINK) & (used >= tl.maximum(least, 1))
    probe = _patient(s, last, probe, allowed, keep, C.PROBE_AT, C.PROBE_PATIENCE, C.PROBE_COUNT)
    margin = _patient(s, last, margin, allowed, keep, C.MARGIN_AT, C.MARGIN_PATIENCE, C.MARGIN_COUNT)
    loop = allowed & ((last & loop_at) != 0) & (loop_hits >= loop_times)
    reason = tl.where(probe, R.PROBE, R.NONE)
    reason = tl.where(_plateau(s, last, entropy, allowed, keep, N), R.ENTROPY, reason)
    reason = tl.where(loop, R.LOOP, reason)
    reason = tl.where(margin, R.MARGIN, reason)
    window = allowed & (window_at >= 0) & (used >= window_at) & ((last & boundary) != 0)
    reason = tl.where(window, R.WINDOW, reason)
    reason = tl.where((reserve_at >= 0) & (gen >= reserve_at), R.RESERVE, reason)
    reason = tl.where((budget >= 0) & (used >= budget), tl.where(budget == 0, R.DISABLED, R.BUDGET), reason)
    reason = tl.where(ctrl != 0, R.MANUAL, reason)
    reason = tl.where(phase == N.phase.GRACE, pending, reason)
    return tl.where(_thinking(phase, N), reason, R.NONE)


@triton.jit
def _write(s, forced, token, phase, begin, reason, last, num_forced, keep, N: tl.constexpr):
    """Where the closing text is being written, its next token, else `token`; and whether it is the last of the text."""
    C: tl.constexpr = N.column
    R: tl.constexpr = N.reason
    text, length = tl.load(s + C.FPTR, mask=keep, other=0), tl.load(s + C.FLEN, mask=keep, other=0)
    place, count = tl.load(s + C.FPOS, mask=keep, other=0), tl.load(s + C.FORCED, mask=keep, other=0)
    budget_text, exit_text = (
        tl.load(s + C.BUDGET_TEXT, mask=keep, other=0),
        tl.load(s + C.EXIT_TEXT, mask=keep, other=0),
    )
    budget_len, exit_len = tl.load(s + C.BUDGET_LEN, mask=keep, other=0), tl.load(s + C.EXIT_LEN, mask=keep, other=0)
    budget_skip, exit_skip = (
        tl.load(s + C.BUDGET_SKIP, mask=keep, other=0),
        tl.load(s + C.EXIT_SKIP, mask=keep, other=0),
    )
    of_budget = (reason == R.DISABLED) | ((reason >= R.BUDGET) & (reason <= R.WINDOW))
    skip = tl.where(of_budget, budget_skip, exit_skip) & (last & N.bit.NEWLINE)
    text = tl.where(begin, tl.where(of_budget, budget_text, exit_text), text)
    length = tl.where(begin, tl.where(of_budget, budget_len, exit_len), length)
    place = tl.where(begin, skip, place)
    force = phase == N.phase.FORCE
    at = tl.minimum(tl.maximum(text + place, 0), num_forced - 1)
    token = tl.where(force, tl.load(forced + at, mask=force, other=0), token)
    tl.store(s + C.FPTR, text, mask=begin)
    tl.store(s + C.FLEN, length, mask=begin)
    tl.store(s + C.FPOS, place + 1, mask=force)
    tl.store(s + C.FORCED, count + 1, mask=force)
    return token, force & (place + 1 >= length)


@triton.jit
def _open(s, opens, N: tl.constexpr):
    """What a new block begins with."""
    C: tl.constexpr = N.column
    tl.store(s + C.BLOCKS, tl.load(s + C.BLOCKS, mask=opens, other=0) + 1, mask=opens)
    tl.store(s + C.GRACE, 0, mask=opens)
    tl.store(s + C.PENDING, 0, mask=opens)
    tl.store(s + C.MARGIN_COUNT, 0, mask=opens)
    tl.store(s + C.LOOP_HITS, 0, mask=opens)
    tl.store(s + C.ENTROPY_COUNT, 0, mask=opens)
    tl.store(s + C.PROBE_COUNT, 0, mask=opens)


@triton.jit
def _notice(s, lut_ptr, token, thought, active, vocab, keep, N: tl.constexpr):
    """What the look-up table says of the token: boundaries, whole characters, repetition."""
    C: tl.constexpr = N.column
    need, loop_at = tl.load(s + C.NEED, mask=keep, other=0), tl.load(s + C.LOOP_AT, mask=keep, other=0)
    before, place = tl.load(s + C.LOOP_HASH, mask=keep, other=0), tl.load(s + C.LOOP_NEXT, mask=keep, other=0)
    tl.static_assert((N.ring & (N.ring - 1)) == 0)
    ring, index = s + (N.width - N.ring), tl.arange(0, N.ring)
    known = (token >= 0) & (token < vocab)
    bits = tl.load(lut_ptr + token, mask=known & active, other=0).to(tl.int32)
    bits = tl.where(known, bits, N.bit.ANY)
    number = (bits & N.bit.MISSING) >> N.missing_shift
    lacking = tl.where((bits & N.bit.CONTINUES) != 0, tl.maximum(need - number, 0), number)
    tl.store(s + C.NEED, lacking, mask=active)
    tl.store(s + C.LAST, bits, mask=active)
    # Each token shifts the earlier ones two bits up: after sixteen they are gone.
    own = token.to(tl.int64) * N.hash_factor & N.hash_mask
    hashed = (before.to(tl.int64) * 4 + own & N.hash_mask).to(tl.int32)
    now = thought & ((bits & loop_at) != 0)
    old = tl.load(tl.expand_dims(ring, -1) + index, mask=tl.expand_dims(thought & (loop_at != 0), -1), other=0)
    same = (old == tl.expand_dims(hashed, -1)) | (index == tl.expand_dims(place, -1))
    tl.store(s + C.LOOP_HASH, hashed, mask=thought)
    tl.store(ring + place, hashed, mask=now & (place >= 0) & (place < N.ring))
    tl.store(s + C.LOOP_HITS, tl.sum(same.to(tl.int32), -1), mask=now)
    tl.store(s + C.LOOP_NEXT, (place + 1) & (N.ring - 1), mask=now)


@triton.jit
def _follow(
    s, token, phase, used, gen, reason, begin, written, is_end, is_tool, is_eos, start, active, keep, N: tl.constexpr
):  # fmt: skip
    """The phase after the token, and the counts. Returns which rows thought it."""
    C: tl.constexpr = N.column
    P: tl.constexpr = N.phase
    R: tl.constexpr = N.reason
    answered, markers = tl.load(s + C.ANSWERED, mask=keep, other=0), tl.load(s + C.MARKERS, mask=keep, other=0)
    count, since = tl.load(s + C.THOUGHT, mask=keep, other=0), tl.load(s + C.SINCE, mask=keep, other=0)
    anew = tl.load(s + C.BLOCK, mask=keep, other=0) == 1
    thinking, answering = _thinking(phase, N), (phase == P.IDLE) | (phase == P.ANSWER)
    opens = answering & (token == start)
    answers = answering & ~opens
    natural, tool = thinking & is_end, thinking & is_tool & ~is_end
    stops = thinking & is_eos & ~is_end & ~is_tool
    ended = natural | tool | stops
    thought = thinking & ~ended
    reason = tl.where(natural, R.NATURAL, tl.where(tool, R.TOOL, tl.where(stops, R.EOS, reason)))
    counted = answers & (phase == P.ANSWER) & (since >= 0)
    phase = tl.where(natural | tool | written, P.ANSWER, phase)
    phase = tl.where(opens, P.THINK, phase)
    phase = tl.where(stops | (answers & is_eos), P.DONE, phase)
    tl.store(s + C.PHASE, phase, mask=active)
    tl.store(s + C.GEN, gen + 1, mask=active)
    tl.store(s + C.USED, tl.where(opens, 0, used + 1), mask=thought | (opens & anew))
    tl.store(s + C.THOUGHT, count + 1, mask=thought)
    tl.store(s + C.ANSWERED, answered + 1, mask=answers | tool)
    tl.store(s + C.MARKERS, markers + 1, mask=opens | natural | stops)
    tl.store(s + C.REASON, reason, mask=ended | begin)
    tl.store(s + C.EXIT_STEP, gen, mask=ended | begin)
    tl.store(s + C.CTRL, 0, mask=ended | begin)
    since = tl.where(begin, 0, tl.where(counted, since + 1, -1))
    tl.store(s + C.SINCE, since, mask=ended | begin | opens | counted)
    _open(s, opens, N)
    return thought


@triton.jit(do_not_specialize=["num_rows", "num_forced", "vocab"])
def budget_step_kernel(
    sampled_ptr, signals_ptr, state_ptr, forced_ptr, lut_ptr, ids_ptr, out_ptr, num_rows, num_forced, vocab,
    N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every number of a row is read before it is written: all threads read it, and one of them writes."""
    C: tl.constexpr = N.column
    P: tl.constexpr = N.phase
    row = tl.program_id(0)
    if ROWS > 1:
        row = row * ROWS + tl.arange(0, ROWS)
    keep = row < num_rows
    s = state_ptr + row.to(tl.int64) * N.width
    token = tl.load(sampled_ptr + row, mask=keep, other=N.no_id).to(tl.int32)
    phase, gen = tl.load(s + C.PHASE, mask=keep, other=P.OFF), tl.load(s + C.GEN, mask=keep, other=0)
    used, least = tl.load(s + C.USED, mask=keep, other=0), tl.load(s + C.MIN, mask=keep, other=0)
    last, need = tl.load(s + C.LAST, mask=keep, other=0), tl.load(s + C.NEED, mask=keep, other=0)
    whole, grace = tl.load(s + C.WHOLE, mask=keep, other=0), tl.load(s + C.GRACE, mask=keep, other=0)
    waits, closes = tl.load(s + C.WAIT, mask=keep, other=0) == 1, tl.load(s + C.CLOSE, mask=keep, other=0) == 1
    start, end = tl.load(ids_ptr + N.id.START), tl.load(ids_ptr + N.id.END)
    active = keep & (phase != P.OFF) & (phase != P.DONE) & (token != N.no_id)
    phase = tl.where(active, phase, P.OFF)  # in which nothing happens

    is_end, is_eos = token == end, _one_of(token, ids_ptr + N.id.EOS + row * 0, keep, N.max_eos)
    is_tool = _one_of(token, s + C.IMPLICIT, keep, N.max_implicit)
    signals = signals_ptr + row.to(tl.int64) * N.num_signals
    reason = _reason(s, signals, phase, used, gen, last, keep, N)
    wait = _thinking(phase, N) & is_end & (reason == 0) & (used < least) & waits
    token = tl.where(wait, tl.load(ids_ptr + N.id.WAIT), token)
    is_end = is_end & ~wait
    # An end of the text cuts whatever character was begun: there is nothing to wait for.
    stays = _thinking(phase, N) & ~is_end & ~is_tool
    hold = stays & (reason > 0) & (whole == 1) & (need > 0) & (grace < N.max_grace) & ~is_eos
    close = stays & (reason == 0) & is_eos & closes
    begin = (stays & (reason > 0) & ~hold) | close
    tl.store(s + C.PENDING, reason, mask=hold)
    tl.store(s + C.GRACE, grace + 1, mask=hold)
    phase = tl.where(hold, P.GRACE, tl.where(begin, P.FORCE, phase))
    reason = tl.where(close, N.reason.EOS, reason)
    forced = forced_ptr + row.to(tl.int64) * num_forced
    token, written = _write(s, forced, token, phase, begin, reason, last, num_forced, keep, N)
    thought = _follow(
        s, token, phase, used, gen, reason, begin, written, is_end, is_tool, is_eos, start, active, keep, N
    )  # fmt: skip
    _notice(s, lut_ptr, token, thought, active, vocab, keep, N)
    tl.store(out_ptr + row, token.to(tl.int64), mask=keep)


def launch(
    layout: Layout,
    rows_per_program: int,
    sampled: Tensor,
    signals: Tensor,
    state: Tensor,
    forced: Tensor,
    lut: Tensor,
    ids: Tensor,
    out: Tensor,
) -> None:
    """Take sampled int64 [R] to `out` int64 [R] and `state` int32 [R, width] a step further; all contiguous.

    signals float32 [R, signals], forced int32 [R, L], lut uint8 [V], ids int32. A GPU reads a row fastest with a
    program of its own; several rows together are for the interpreter.
    """
    num_rows = sampled.shape[0]
    budget_step_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        sampled, signals, state, forced, lut, ids, out, num_rows, forced.shape[1], lut.shape[0],
        N=layout, ROWS=rows_per_program, num_warps=1,
        enable_fp_fusion=False,  # the moving averages are rounded after each product, as the reference's are
    )  # fmt: skip
