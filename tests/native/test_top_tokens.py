"""top_tokens on every instruction set: the ids of a stable sort, whatever the threads; in a call and in a plan."""

import pytest
import torch

from qwenopt.ops import TOP_TOKENS

SIZES = [(1, 70001), (5, 4097), (3, 33), (7, 1)]
KS = [1, 2, 20, 64, 1024]
# Kinds of logits: none equal to speak of; many equal; all equal; hidden; NaN, few or more than k; each larger than the
# one before, so that none can be passed over; both zeros.
KINDS = ["random", "rounded", "equal", "hidden", "few nan", "many nan", "ascending", "zeros"]


def logits_of(kind, shape, dtype):
    x = torch.randn(shape)
    if kind == "rounded":
        x = (3 * x).round()
    elif kind == "equal":
        x = torch.full(shape, -2.5)
    elif kind == "hidden":
        x = x.masked_fill(torch.rand(shape) < 0.9, -torch.inf)
    elif kind in ("few nan", "many nan"):
        x = x.masked_fill(torch.rand(shape) < (0.001 if kind == "few nan" else 0.5), torch.nan)
    elif kind == "ascending":
        x = x.sort(-1)[0]
    elif kind == "zeros":
        x = torch.where(x < 0, -0.0, 0.0)
    return x.to(dtype)


def wanted(logits, k):
    """The specification: torch's stable sort, and the elements themselves with the sign of their zeros."""
    ids = logits.sort(dim=-1, descending=True, stable=True)[1][:, :k]
    return logits.gather(1, ids), ids


def assert_same(check, found, values, ids):
    assert torch.equal(found[1], ids)
    nan = values.isnan()  # gather may give a NaN other bits
    assert torch.equal(found[0].isnan(), nan)
    check.same_bits(found[0].masked_fill(nan, 0), values.masked_fill(nan, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_ids_are_those_of_a_stable_sort(kernels, check, isa, dtype, shape, kind):
    logits = logits_of(kind, shape, dtype)
    for k in sorted({min(k, shape[1]) for k in KS}):
        assert_same(check, kernels.on(isa).top_tokens(logits, k), *wanted(logits, k))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_gives_the_same(check, dtype, kind):
    logits = logits_of(kind, (5, 3001), dtype)
    for k in KS:
        assert_same(check, TOP_TOKENS.reference(logits, k), *wanted(logits, k))
    assert torch.equal(TOP_TOKENS.reference(logits, 1)[1][:, 0], logits.argmax(-1))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_threads_change_nothing(kernels, check, isa, threads, rows):
    """Shares that end inside rows, and rows that several threads share."""
    logits = logits_of("rounded", (rows, 300007 // rows), torch.float32)
    kernels.threads = threads
    assert_same(check, kernels.on(isa).top_tokens(logits, 50), *wanted(logits, 50))


def test_rows_may_lie_apart(kernels, check, isa, dtype):
    wide = check.randn(4, 5000, dtype=dtype)
    logits = wide[:, :4000]
    assert_same(check, kernels.on(isa).top_tokens(logits, 9), *wanted(logits, 9))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_step_of_a_plan(kernels, check, isa, dtype, threads):
    """A plan may have more threads than the step has use for."""
    for rows, size in ((1, 100), (3, 70001)):
        logits, ids = check.randn(rows, size, dtype=dtype), torch.full((rows, 6), -7)
        values = torch.zeros(rows, 6, dtype=dtype)
        scratch = torch.zeros(kernels.C.top_tokens_scratch_bytes(rows, size, 6, threads), dtype=torch.uint8)
        tensors, numbers = (logits, values, ids, scratch), (rows, size, 6, size, kernels.code(dtype))
        operands = [*((i, 1, 0) for i in range(4)), *((-1, 0, n) for n in numbers)]
        large = torch.zeros(1 << 20, dtype=torch.float32)  # makes the team whole
        norm = [(-1, 0, large.data_ptr())] * 3 + [(-1, 0, n) for n in (1024, 1024, 1024, 0, 0)]
        plan = kernels.C.Plan([("rms_norm", norm, True), ("top_tokens", operands, True)], 4)
        plan.run([t.data_ptr() for t in tensors], threads, isa)
        assert_same(check, (values, ids), *wanted(logits, 6))


def test_arguments_are_checked(kernels):
    with pytest.raises(ValueError, match=r"top_tokens: K is 9; it must be 1..8"):
        kernels.C.top_tokens(1, 1, 1, 1, 2, 8, 9, 8, 0, 1)
    with pytest.raises(ValueError, match=r"top_tokens: K is 1025; it must be 1..1024"):
        kernels.C.top_tokens(1, 1, 1, 1, 2, 5000, 1025, 5000, 0, 1)
    with pytest.raises(ValueError, match="top_tokens: V is 0"):
        kernels.C.top_tokens(1, 1, 1, 1, 2, 0, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="top_tokens: scratch is a null pointer"):
        kernels.C.top_tokens(1, 1, 1, 0, 2, 8, 1, 8, 0, 1)
