"""budget_guard in Triton: a program for each row, which writes the few logits that its state asks for."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.budget_layout import Layout


@triton.jit
def _raised(s, used, N: tl.constexpr):
    """What the soft bias adds to the end marker of a row that thinks; 0 away from boundaries."""
    C: tl.constexpr = N.column
    bias = tl.load(s + C.SOFT_BIAS).to(tl.float32, bitcast=True)
    boundary, need, last = tl.load(s + C.BOUNDARY), tl.load(s + C.NEED), tl.load(s + C.LAST)
    ahead, width = used - tl.load(s + C.SOFT_AT), tl.maximum(tl.load(s + C.SOFT_WIDTH), 1)
    here = ((boundary == N.bit.ANY) & (need == 0)) | ((boundary != N.bit.ANY) & ((last & boundary) != 0))
    ramp = tl.minimum(tl.maximum(tl.div_rn(ahead.to(tl.float32), width.to(tl.float32)), 0.0), 1.0)
    return tl.where(here, bias * (ramp * ramp), 0.0)


@triton.jit
def _hide(logits, id, hidden, vocab):
    tl.store(logits + id, -float("inf"), mask=hidden & (id >= 0) & (id < vocab))


@triton.jit(do_not_specialize=["vocab"])
def budget_guard_kernel(logits_ptr, state_ptr, ids_ptr, stride, vocab, N: tl.constexpr):
    C: tl.constexpr = N.column
    row = tl.program_id(0).to(tl.int64)
    s, logits = state_ptr + row * N.width, logits_ptr + row * stride
    phase, used, since = tl.load(s + C.PHASE), tl.load(s + C.USED), tl.load(s + C.SINCE)
    least, wait = tl.load(s + C.MIN), tl.load(s + C.WAIT)
    guard, min_answer = tl.load(s + C.GUARD), tl.load(s + C.MIN_ANSWER)
    start, end = tl.load(ids_ptr + N.id.START), tl.load(ids_ptr + N.id.END)
    ramp = _raised(s, used, N)
    thinks, answers = phase == N.phase.THINK, (phase == N.phase.ANSWER) & (since >= 0)
    closed = answers & (since < guard)
    hidden = closed | (thinks & (used < least) & (wait == 0))
    raised = thinks & (ramp > 0) & (end >= 0) & (end < vocab) & (hidden == 0)
    value = tl.load(logits + end, mask=raised, other=0).to(tl.float32) + ramp
    tl.store(logits + end, value.to(logits_ptr.dtype.element_ty), mask=raised)
    _hide(logits, end, hidden, vocab)
    _hide(logits, start, closed, vocab)
    MAX_EOS: tl.constexpr = N.max_eos
    for i in tl.static_range(MAX_EOS):
        _hide(logits, tl.load(ids_ptr + N.id.EOS + i), answers & (since < min_answer), vocab)


def launch(layout: Layout, logits: Tensor, state: Tensor, ids: Tensor) -> None:
    """Change `logits` [R, V], whose rows are contiguous, as `state` int32 [R, width] asks; ids int32."""
    budget_guard_kernel[(logits.shape[0],)](
        logits, state, ids, logits.stride(0), logits.shape[1], N=layout, num_warps=1, enable_fp_fusion=False
    )
