"""logit_signals on every instruction set: margins bit for bit, entropies within what float32 sums allow."""

import math

import pytest
import torch

from qwenopt.ops import LOGIT_SIGNALS
from qwenopt.testing.formulas import logit_signals as formula

SIZES = [(1, 70001), (5, 4097), (3, 4096), (3, 33), (7, 1)]
PART, LANES = 4096, 4  # columns of a part of the kernel; lanes of the narrowest vector, of which two are added to


def assert_close(found, logits, truth):
    """S = sum e^d and T = sum e^d d, d = x - max, carry relative errors; H = log(S) - T / S.

    A lane adds PART / (2 LANES) terms, then two vectors and the lanes are added; an exp is good for 2 ulp, and is
    given a d that was rounded: (|d| + 3) u more. Terms of T all have one sign, so its error is relative as well; d is
    at most 87 where a term counts. So |dH| <= e_S + |T / S| (e_S + e_T), |T / S| <= log(V), and one rounding of H.
    """
    unit = torch.finfo(torch.float32).eps / 2
    spread = min(87.0, (logits.amax(-1) - logits.amin(-1)).nan_to_num(posinf=87.0).max().item())
    relative = (PART / (2 * LANES) + 8 + 4 + spread + 3) * unit
    bound = relative + math.log(logits.shape[1]) * (2 * relative + unit) + unit * truth.abs() + 1e-37
    assert not found.isnan().any()
    worst = ((found.double() - truth).abs() / bound).max().item()
    assert worst <= 1, f"the error is {worst:.2f} times what float32 allows"


@pytest.mark.parametrize("scale", [1, 5, 60, "hidden", "equal"], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_signals_are_the_references(kernels, check, isa, dtype, shape, scale):
    logits = torch.randn(shape)
    if scale == "hidden":
        logits = logits.masked_fill(torch.arange(shape[1]) % 7 > 0, -torch.inf)
        logits[:, 4096:8192] = -torch.inf  # a part of nothing else
    else:
        logits = torch.zeros(shape) if scale == "equal" else scale * logits
    logits = logits.to(dtype)
    found = kernels.on(isa).logit_signals(logits, shape[1] // 14 * 7, True)
    check.same_bits(found[:, 0], LOGIT_SIGNALS.reference(logits, shape[1] // 14 * 7, True)[:, 0])
    assert_close(found[:, 1], logits, formula(logits, 0, True)[:, 1])
    alone = kernels.on(isa).logit_signals(logits, shape[1] // 14 * 7, False)
    check.same_bits(alone[:, 0], found[:, 0])
    assert not alone[:, 1].any()


@pytest.mark.parametrize("size", [9, 5000])
def test_rows_without_a_distribution_have_nan(kernels, check, isa, dtype, size):
    """As the reference; the NaN or infinity in the last place, where vectors end."""
    logits = check.randn(6, size, dtype=dtype)
    logits[0, -1], logits[1, -1], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, :] = -torch.inf
    logits[3, -1] = 2.0  # certain: no entropy
    logits[4, 0], logits[4, -1] = torch.nan, torch.inf
    for entropy in (True, False):
        found = kernels.on(isa).logit_signals(logits, 1, entropy)
        wanted = LOGIT_SIGNALS.reference(logits, 1, entropy)
        torch.testing.assert_close(found[:, 0], wanted[:, 0], equal_nan=True, rtol=0, atol=0)
        assert torch.equal(found.isnan(), wanted.isnan())
        if entropy:
            rows = [3, 5]  # the others have none
            assert_close(found[rows, 1], logits[rows], formula(logits[rows], 1, True)[:, 1])
        else:
            assert torch.equal(found[:, 1], wanted[:, 1])
        assert found[3].tolist() == [torch.inf, 0.0]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_and_neighbours_change_no_bit(kernels, check, isa, dtype, threads):
    logits = check.randn(5, 70001, dtype=dtype)
    kernels.threads = 1
    alone = torch.cat([kernels.on(isa).logit_signals(row[None], 3, True) for row in logits])
    kernels.threads = threads
    check.same_bits(kernels.on(isa).logit_signals(logits, 3, True), alone)


def test_rows_may_lie_apart(kernels, check, isa, dtype):
    logits = check.randn(4, 5000, dtype=dtype)[:, :4500]
    found = kernels.on(isa).logit_signals(logits, 4499, True)
    check.same_bits(found, kernels.on(isa).logit_signals(logits.contiguous(), 4499, True))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_step_of_a_plan(kernels, check, isa, dtype, threads):
    logits, out = check.randn(3, 70001, dtype=dtype), torch.full((3, 2), torch.nan)
    scratch = torch.zeros(kernels.C.logit_signals_scratch_bytes(3, 70001), dtype=torch.uint8)
    numbers = (3, 70001, 5, 70001, 1, kernels.code(dtype))
    operands = [*((i, 1, 0) for i in range(3)), *((-1, 0, n) for n in numbers)]
    plan = kernels.C.Plan([("logit_signals", operands, True)], 3)
    plan.run([logits.data_ptr(), out.data_ptr(), scratch.data_ptr()], threads, isa)
    check.same_bits(out, kernels.on(isa).logit_signals(logits, 5, True))


def test_arguments_are_checked(kernels):
    with pytest.raises(ValueError, match=r"logit_signals: end 8 of 8 columns; it must be 0..7"):
        kernels.C.logit_signals(1, 1, 1, 2, 8, 8, 8, True, 0, 1)
    with pytest.raises(ValueError, match="logit_signals: out is a null pointer"):
        kernels.C.logit_signals(1, 0, 1, 2, 8, 1, 8, True, 0, 1)
