"""budget_step: Qwen3's thinking under control, one token at a time, after sampling and without a host read.

What the columns of the state mean is in `budget_state.py`. The order of the parts of a step is its meaning: ends that
the model chose itself come before those that are forced on it, and what is forced replaces the sampled token, so that
no filter, penalty or grammar can stand in its way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.budget_state import (
    FLOATS,
    HASH_FACTOR,
    HASH_MASK,
    MAX_EOS,
    MAX_GRACE,
    MAX_IMPLICIT,
    MISSING_SHIFT,
    NO_ID,
    NUM_IDS,
    RING,
    WIDTH,
    Bit,
    Column,
    Id,
    Phase,
    Reason,
    Signal,
)
from qwenopt.ops.cuda import budget_step as cuda_kernels
from qwenopt.ops.cuda.providers import register
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, Steps, need_contiguous
from qwenopt.ops.triton import budget_step as by_triton

Columns = dict[Column, Tensor]
_RULE_STATE = (Column.GRACE, Column.PENDING, Column.MARGIN_COUNT, Column.LOOP_HITS, Column.ENTROPY_COUNT)


def _check(sampled: Tensor, signals: Tensor, state: Tensor, forced: Tensor, lut: Tensor, ids: Tensor) -> None:
    rows = sampled.shape[0] if sampled.dim() == 1 else -1
    torch._check(
        state.shape == (rows, WIDTH) and forced.dim() == 2 and forced.shape[0] == rows and forced.shape[1] > 0,
        lambda: (
            f"budget_step: sampled {tuple(sampled.shape)}, state {tuple(state.shape)} and forced "
            f"{tuple(forced.shape)} must be (R,), (R, {WIDTH}) and (R, L)"
        ),
    )
    torch._check(
        signals.shape == (rows, len(Signal)) and lut.dim() == 1 and lut.shape[0] > 0 and ids.shape == (NUM_IDS,),
        lambda: (
            f"budget_step: signals {tuple(signals.shape)}, lut {tuple(lut.shape)} and ids {tuple(ids.shape)} must "
            f"be ({rows}, {len(Signal)}), (V,) and ({NUM_IDS},)"
        ),
    )
    wanted = ((sampled, torch.int64), (state, torch.int32), (forced, torch.int32), (lut, torch.uint8))
    for tensor, dtype in (*wanted, (ids, torch.int32), (signals, torch.float32)):
        torch._check(tensor.dtype == dtype, lambda a=tensor, d=dtype: f"budget_step: {a.dtype} where {d} is needed")


def budget_step(sampled: Tensor, signals: Tensor, state: Tensor, forced: Tensor, lut: Tensor, ids: Tensor) -> Tensor:
    """Replace sampled tokens where the thinking of their row must end, and bring `state` up to date.

    sampled int64 [R] (-1: nothing was sampled; -2: the row sits this step out), signals float32 [R, 3] (`Signal`),
    state int32 [R, 128] (`Column`; written to), forced int32 [R, L] the closing texts of each row, lut uint8 [V]
    (`Bit`), ids int32 [8] (`Id`).
    Returns int64 [R]. Rows do not see each other.
    """
    _check(sampled, signals, state, forced, lut, ids)
    s = {c: _floats(state[:, c]) if c in FLOATS else state[:, c].clone() for c in Column}
    ring = state[:, WIDTH - RING :]
    token = sampled.to(torch.int32)
    active = (s[Column.PHASE] != Phase.OFF) & (s[Column.PHASE] != Phase.DONE) & (token != NO_ID)
    implicit = torch.stack([state[:, Column.IMPLICIT + i] for i in range(MAX_IMPLICIT)], 1)
    is_end = token == ids[Id.END]
    is_tool = (token[:, None] == implicit).any(1)
    is_eos = (token[:, None] == ids[Id.EOS : Id.EOS + MAX_EOS]).any(1)

    reason = _reason(s, signals)
    thinking = _thinking(s)
    wait = thinking & is_end & (reason == 0) & (s[Column.USED] < s[Column.MIN]) & (s[Column.WAIT] == 1)
    token = torch.where(wait, ids[Id.WAIT], token)
    is_end = is_end & ~wait
    # An end of the text cuts whatever character was begun: there is nothing to wait for.
    cut = thinking & ~is_end & ~is_tool & (reason > 0)
    hold = cut & (s[Column.WHOLE] == 1) & (s[Column.NEED] > 0) & (s[Column.GRACE] < MAX_GRACE) & ~is_eos
    close = thinking & ~is_end & ~is_tool & (reason == 0) & is_eos & (s[Column.CLOSE] == 1)
    _hold(s, hold, reason)
    _begin(s, (cut & ~hold) | close, torch.where(close, Reason.EOS, reason))
    token = _write(s, token, forced)
    thought = _follow(s, token, ids, is_end, is_tool, is_eos)
    ring = _notice(s, token, lut, ring, thought)
    s[Column.GEN] = s[Column.GEN] + 1

    new = torch.stack([s[c].view(torch.int32) if c in FLOATS else s[c] for c in Column], 1)
    kept = state[:, Column.IMPLICIT + 1 : Column.GUARD]  # of four ids, only the first has a name
    new = torch.cat([new[:, : Column.IMPLICIT + 1], kept, new[:, Column.IMPLICIT + 1 :], ring], 1)
    state.copy_(torch.where(active[:, None], new, state))
    return torch.where(active, token, sampled.to(torch.int32)).to(torch.int64)


def _floats(column: Tensor) -> Tensor:
    return column.contiguous().view(torch.float32)


def _thinking(s: Columns) -> Tensor:
    return (s[Column.PHASE] == Phase.THINK) | (s[Column.PHASE] == Phase.GRACE)


def _at(s: Columns, mask: Tensor) -> Tensor:
    """Whether the last token was a boundary for `mask`."""
    return (s[Column.LAST] & mask) != 0


def _reason(s: Columns, signals: Tensor) -> Tensor:
    """Why the block of each row must end now, int32 [R]; 0 where it need not. Counts the boundaries of the rules."""
    used, budget = s[Column.USED], s[Column.BUDGET]
    allowed = (s[Column.PHASE] == Phase.THINK) & (used >= s[Column.MIN].clamp(min=1))
    spent = (budget >= 0) & (used >= budget)
    reserve = (s[Column.RESERVE_AT] >= 0) & (s[Column.GEN] >= s[Column.RESERVE_AT])
    window = (s[Column.WINDOW_AT] >= 0) & (used >= s[Column.WINDOW_AT]) & _at(s, s[Column.BOUNDARY])
    rules = {
        Reason.WINDOW: window & allowed,
        Reason.MARGIN: _patient(s, "MARGIN", signals[:, Signal.MARGIN] <= s[Column.MARGIN_TAU], allowed),
        Reason.LOOP: allowed & _at(s, s[Column.LOOP_AT]) & (s[Column.LOOP_HITS] >= s[Column.LOOP_TIMES]),
        Reason.ENTROPY: _plateau(s, signals[:, Signal.ENTROPY], allowed),
        Reason.PROBE: _patient(s, "PROBE", signals[:, Signal.PROBE] > s[Column.PROBE_TAU], allowed),
    }
    reason = torch.zeros_like(used)
    for code, hit in reversed(rules.items()):
        reason = torch.where(hit, code, reason)
    reason = torch.where(reserve, Reason.RESERVE, reason)
    reason = torch.where(spent, torch.where(budget == 0, Reason.DISABLED, Reason.BUDGET), reason)
    reason = torch.where(s[Column.CTRL] != 0, Reason.MANUAL, reason)
    reason = torch.where(s[Column.PHASE] == Phase.GRACE, s[Column.PENDING], reason)
    return torch.where(_thinking(s), reason, 0).to(torch.int32)


def _patient(s: Columns, rule: str, hit: Tensor, allowed: Tensor) -> Tensor:
    """Whether `hit` held at as many boundaries in a row as the rule's patience asks for."""
    at, patience, count = Column[rule + "_AT"], Column[rule + "_PATIENCE"], Column[rule + "_COUNT"]
    now = allowed & _at(s, s[at])
    s[count] = torch.where(now, torch.where(hit, s[count] + 1, 0), s[count])
    return now & (s[count] >= s[patience])


def _plateau(s: Columns, entropy: Tensor, allowed: Tensor) -> Tensor:
    """Whether the moving mean and variance of the entropy at boundaries are both low, after enough boundaries."""
    now = allowed & _at(s, s[Column.ENTROPY_AT])
    first = s[Column.ENTROPY_COUNT] == 0
    alpha = s[Column.ENTROPY_ALPHA]
    mean = torch.where(first, entropy, alpha * entropy + (1 - alpha) * s[Column.ENTROPY_MEAN])
    off = entropy - mean
    var = torch.where(first, 0.0, alpha * (off * off) + (1 - alpha) * s[Column.ENTROPY_VAR])
    s[Column.ENTROPY_MEAN] = torch.where(now, mean, s[Column.ENTROPY_MEAN])
    s[Column.ENTROPY_VAR] = torch.where(now, var, s[Column.ENTROPY_VAR])
    s[Column.ENTROPY_COUNT] = s[Column.ENTROPY_COUNT] + now.to(torch.int32)
    low = (var < s[Column.ENTROPY_DELTA]) & (mean < s[Column.ENTROPY_ETA])
    return now & low & (s[Column.ENTROPY_COUNT] >= s[Column.ENTROPY_AFTER])


def _hold(s: Columns, hold: Tensor, reason: Tensor) -> None:
    """Let one more token pass, since the last character lacks bytes."""
    s[Column.PHASE] = torch.where(hold, Phase.GRACE, s[Column.PHASE])
    s[Column.PENDING] = torch.where(hold, reason, s[Column.PENDING])
    s[Column.GRACE] = s[Column.GRACE] + hold.to(torch.int32)


def _begin(s: Columns, begin: Tensor, reason: Tensor) -> None:
    """Start to write the closing text that goes with the reason."""
    of_budget = (reason == Reason.DISABLED) | ((reason >= Reason.BUDGET) & (reason <= Reason.WINDOW))
    skip = torch.where(of_budget, s[Column.BUDGET_SKIP], s[Column.EXIT_SKIP])
    skip = skip & (s[Column.LAST] & Bit.NEWLINE)
    for column, value in (
        (Column.FPTR, torch.where(of_budget, s[Column.BUDGET_TEXT], s[Column.EXIT_TEXT])),
        (Column.FLEN, torch.where(of_budget, s[Column.BUDGET_LEN], s[Column.EXIT_LEN])),
        (Column.FPOS, skip),
        (Column.REASON, reason),
        (Column.EXIT_STEP, s[Column.GEN]),
        (Column.PHASE, Phase.FORCE),
        (Column.SINCE, 0),
        (Column.CTRL, 0),
    ):
        s[column] = torch.where(begin, value, s[column])


def _write(s: Columns, token: Tensor, forced: Tensor) -> Tensor:
    """The next token of the closing text in rows that are writing one; `s[PHASE]` stays FORCE until `_follow`."""
    force = s[Column.PHASE] == Phase.FORCE
    place = (s[Column.FPTR] + s[Column.FPOS]).clamp(0, forced.shape[1] - 1).to(torch.int64)
    token = torch.where(force, forced.gather(1, place[:, None])[:, 0], token)
    s[Column.FPOS] = s[Column.FPOS] + force.to(torch.int32)
    s[Column.FORCED] = s[Column.FORCED] + force.to(torch.int32)
    return token


def _follow(s: Columns, token: Tensor, ids: Tensor, is_end: Tensor, is_tool: Tensor, is_eos: Tensor) -> Tensor:
    """The phase after the token, and the counts. Returns which rows thought it."""
    phase, thinking = s[Column.PHASE], _thinking(s)
    answering = (phase == Phase.IDLE) | (phase == Phase.ANSWER)
    opens = answering & (token == ids[Id.START])
    natural, tool = thinking & is_end, thinking & is_tool & ~is_end
    stops = thinking & is_eos & ~is_end & ~is_tool
    thought = thinking & ~is_end & ~is_tool & ~is_eos
    done = stops | (answering & is_eos & ~opens)

    def where(column: Column, rows: Tensor, value: Any) -> None:
        s[column] = torch.where(rows, value, s[column])

    s[Column.ANSWERED] = s[Column.ANSWERED] + ((answering & ~opens) | tool).to(torch.int32)
    s[Column.MARKERS] = s[Column.MARKERS] + (opens | natural | stops).to(torch.int32)
    s[Column.THOUGHT] = s[Column.THOUGHT] + thought.to(torch.int32)
    s[Column.USED] = s[Column.USED] + thought.to(torch.int32)
    s[Column.BLOCKS] = s[Column.BLOCKS] + opens.to(torch.int32)
    s[Column.SINCE] = s[Column.SINCE] + ((phase == Phase.ANSWER) & ~opens & (s[Column.SINCE] >= 0)).to(torch.int32)
    where(Column.REASON, natural, Reason.NATURAL)
    where(Column.REASON, tool, Reason.TOOL)
    where(Column.REASON, stops, Reason.EOS)
    where(Column.EXIT_STEP, natural | tool | stops, s[Column.GEN])
    where(Column.CTRL, natural | tool | stops, 0)
    where(Column.SINCE, natural | tool | stops | opens, -1)
    where(Column.USED, opens & (s[Column.BLOCK] == 1), 0)
    for column in (*_RULE_STATE, Column.PROBE_COUNT):
        where(column, opens, 0)
    written = (phase == Phase.FORCE) & (s[Column.FPOS] >= s[Column.FLEN])
    where(Column.PHASE, natural | tool | written, Phase.ANSWER)
    where(Column.PHASE, opens, Phase.THINK)
    where(Column.PHASE, done, Phase.DONE)
    return thought


def _hash(before: Tensor, token: Tensor) -> Tensor:
    """Each token shifts the earlier ones two bits up: after sixteen they are gone."""
    value = before.to(torch.int64) * 4 + (token.to(torch.int64) * HASH_FACTOR & HASH_MASK)
    return (value & HASH_MASK).to(torch.int32)


def _notice(s: Columns, token: Tensor, lut: Tensor, ring: Tensor, thought: Tensor) -> Tensor:
    """What the look-up table says of the token: boundaries, whole characters, repetition. Returns the new ring."""
    known = (token >= 0) & (token < lut.shape[0])
    bits = lut[token.clamp(0, lut.shape[0] - 1).to(torch.int64)].to(torch.int32)
    bits = torch.where(known, bits, Bit.ANY)
    number = (bits & Bit.MISSING) >> MISSING_SHIFT
    s[Column.NEED] = torch.where((bits & Bit.CONTINUES) != 0, (s[Column.NEED] - number).clamp(min=0), number)
    s[Column.LAST] = bits
    s[Column.LOOP_HASH] = torch.where(thought, _hash(s[Column.LOOP_HASH], token), s[Column.LOOP_HASH])
    now = thought & _at(s, s[Column.LOOP_AT])
    place = torch.arange(RING, device=ring.device, dtype=torch.int32) == s[Column.LOOP_NEXT][:, None]
    ring = torch.where(now[:, None] & place, s[Column.LOOP_HASH][:, None], ring)
    hits = (ring == s[Column.LOOP_HASH][:, None]).sum(1, dtype=torch.int32)
    s[Column.LOOP_HITS] = torch.where(now, hits, s[Column.LOOP_HITS])
    s[Column.LOOP_NEXT] = torch.where(now, (s[Column.LOOP_NEXT] + 1) % RING, s[Column.LOOP_NEXT])
    return ring


BUDGET_STEP = Op(budget_step, check=_check, mutates=("state",))


def _accepts(sampled: Tensor, signals: Tensor, state: Tensor, forced: Tensor, lut: Tensor, ids: Tensor) -> str | None:
    return cpu.contiguous(sampled=sampled, signals=signals, state=state, forced=forced, lut=lut, ids=ids)


def _operands(sampled: Any, signals: Any, state: Any, forced: Any, lut: Any, ids: Any, out: Any) -> tuple[Any, ...]:
    tensors = (sampled, signals, state, forced, lut, ids, out)
    return (*(t.data_ptr() for t in tensors), *forced.shape, lut.shape[0])


def _record(steps: Steps, sampled: Array, signals: Array, state: Array, forced: Array, lut: Array, ids: Array) -> Array:
    need_contiguous(sampled=sampled, signals=signals, state=state, forced=forced, lut=lut, ids=ids)
    out = steps.empty(sampled.shape, torch.int64)
    reads = (sampled, signals, state, forced, lut, ids)
    steps.add("budget_step", _operands(*reads, out), reads, (out, state), serial=True)
    return out


@BUDGET_STEP.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def budget_step_cpu(
    sampled: Tensor, signals: Tensor, state: Tensor, forced: Tensor, lut: Tensor, ids: Tensor
) -> Tensor:
    out = torch.empty_like(sampled)
    cpu.lib().budget_step(*_operands(sampled, signals, state, forced, lut, ids, out), cpu.threads())
    return out


BUDGET_STEP.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.budget_step)


# Behind Triton, which is ahead or not by a measurement on a GPU; none was made yet.
register(BUDGET_STEP, cuda_kernels.accepts_step, cuda_kernels.step)
