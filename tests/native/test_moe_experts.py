"""moe_experts: against fp64, skipped and unused experts, ids out of range, and rows that do not know each other."""

import pytest
import torch
from torch.nn import functional as F


def make(check, dtype, t, n, i, e, k, offset=0):
    x = check.randn(t, n, dtype=dtype, offset=offset)
    gate_up = check.randn(e, 2 * i, n, dtype=dtype, offset=offset)
    down = check.randn(e, n, i, dtype=dtype, offset=offset)
    indices = torch.stack([torch.randperm(e)[:k] for _ in range(t)]) if t else torch.empty(0, k, dtype=torch.int64)
    weights = torch.rand(t, k).to(dtype)
    return x, indices, weights, gate_up / n**0.5, down / i**0.5


def exact(x, indices, weights, gate_up, down):
    """The result in fp64 and, beside it, the sum of all absolute values that went into it."""
    e, i = gate_up.shape[0], gate_up.shape[1] // 2
    out, size = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    gate_up, down, x, weights = gate_up.double(), down.double(), x.double(), weights.double()
    for t in range(x.shape[0]):
        for j in range(indices.shape[1]):
            expert = indices[t, j].item()
            if expert == e:
                continue
            both, both_size = gate_up[expert] @ x[t], gate_up[expert].abs() @ x[t].abs()
            # |silu'| <= 1.1, so an error in the gate comes through at most that much larger.
            hidden = F.silu(both[:i]) * both[i:]
            hidden_size = 1.1 * both_size[:i] * both[i:].abs() + F.silu(both[:i]).abs() * both_size[i:] + hidden.abs()
            out[t] += weights[t, j] * (down[expert] @ hidden)
            size[t] += weights[t, j] * (down[expert].abs() @ hidden_size)
    return out, size


@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 3, 4, 2),
        (7, 96, 40, 6, 3),
        (20, 130, 65, 5, 2),
        (90, 33, 31, 2, 1),
        (3, 64, 32, 130, 8),
        (60, 64, 96, 6, 2),
        (100, 96, 160, 2, 2),
    ],
    ids=str,
)
def test_matches_fp64(kernels, check, isa, dtype, shape):
    t, n, i, e, k = shape
    args = make(check, dtype, t, n, i, e, k)
    out, size = exact(*args)
    # Roundings to the dtype on the way, each relative to what `size` sums: gate, up, silu, product, y, weighted: 6.
    # The fp32 sums have n, i and k terms. In bf16 the hidden row enters with its rounding, so all count on the size.
    extra = 6 * check.unit(dtype) + 2 * (n + 8) * check.unit(torch.float32)
    check.dot_close(kernels.on(isa).moe_experts(*args), out, size, terms=i + k, extra=extra)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_error_is_no_larger_than_of_the_same_steps_in_torch(kernels, check, isa, kind):
    """The bound above is loose; this one is not: the same cast order in torch, compared in the mean."""
    x, indices, weights, gate_up, down = make(check, kind, 16, 256, 96, 4, 2)
    i = 96
    steps = torch.zeros(16, 256)
    for t in range(16):
        for j in range(2):
            expert = indices[t, j]
            both = (gate_up[expert].float() @ x[t].float()).to(kind)
            hidden = F.silu(both[:i]) * both[i:]
            y = (down[expert].float() @ hidden.float()).to(kind)
            steps[t] += (y * weights[t, j]).float()
    out = kernels.on(isa).moe_experts(x, indices, weights, gate_up, down)
    # A hidden element rounds apart in gate, up or product, sums of 256 terms; one of the 96 then shifts y by about its
    # share of that sum, 96^-1/2, so 96 of them count 96^1/2 times. Then y itself, and all that for two experts.
    check.rarely_apart(out, steps.to(kind), 2 * (96**0.5 * 3 * 256**0.5 + 96**0.5))


def test_skipped_pairs_and_unused_experts(kernels, check, isa, dtype):
    x, indices, weights, gate_up, down = make(check, dtype, 9, 64, 32, 8, 3)
    indices = indices % 3  # experts 3..7 get nothing
    gate_up[3:], down[3:] = torch.nan, torch.nan
    indices[2, 1] = 8
    indices[4] = 8
    weights[4] = torch.nan
    out = kernels.on(isa).moe_experts(x, indices, weights, gate_up, down)
    assert (out[4] == 0).all()
    expected, size = exact(x, indices, weights, gate_up, down)
    extra = 6 * check.unit(dtype) + 2 * 72 * check.unit(torch.float32)
    check.dot_close(out, expected, size, terms=32 + 3, extra=extra)


@pytest.mark.parametrize("bad", [-1, 9, 1 << 40])
def test_id_out_of_range_raises_before_anything_is_written(kernels, check, bad):
    x, indices, weights, gate_up, down = make(check, torch.float32, 4, 8, 4, 8, 2)
    indices[3, 1] = bad
    out, scratch = torch.full((4, 8), 5.0), torch.zeros(1 << 16, dtype=torch.uint8)
    text = rf"moe_experts: expert id {bad} of 8 experts; ids must be 0\.\.7, or 8 to skip"
    with pytest.raises(IndexError, match=text):
        kernels.C.moe_experts(
            x.data_ptr(), indices.data_ptr(), weights.data_ptr(), gate_up.data_ptr(), down.data_ptr(), out.data_ptr(),
            scratch.data_ptr(), 4, 8, 4, 8, 2, 8, 0, 2,
        )  # fmt: skip
    assert (out == 5.0).all()
    assert (scratch == 0).all()


def test_rows_do_not_depend_on_each_other(kernels, check, isa, dtype):
    x, indices, weights, gate_up, down = make(check, dtype, 45, 72, 40, 3, 2)
    run = kernels.on(isa).moe_experts
    whole = run(x, indices, weights, gate_up, down)
    order = torch.randperm(45)
    check.same_bits(run(x[order], indices[order], weights[order], gate_up, down), whole[order])
    for t in (0, 17, 44):
        rows = slice(t, t + 1)
        check.same_bits(run(x[rows], indices[rows], weights[rows], gate_up, down), whole[rows])


def test_rows_in_tiles_do_not_know_their_order_or_the_threads(kernels, check, isa, dtype):
    """Sizes that AMX tiles take; experts of 1 to 3 rows, 4 to 16, and more than 32."""
    x, _, weights, gate_up, down = make(check, dtype, 60, 64, 96, 8, 2)
    indices = torch.tensor([[0, 1]] * 35 + [[2, 3]] * 9 + [[4, 5]] * 4 + [[6, 1]] * 2 + [[7, 2]] * 10)
    run = kernels.on(isa).moe_experts
    whole = run(x, indices, weights, gate_up, down)
    expected, size = exact(x, indices, weights, gate_up, down)
    extra = 6 * check.unit(dtype) + 2 * 72 * check.unit(torch.float32)
    check.dot_close(whole, expected, size, terms=96 + 2, extra=extra)
    order = torch.randperm(60)
    check.same_bits(run(x[order], indices[order], weights[order], gate_up, down), whole[order])
    one = kernels.on(isa)
    one.threads = 1
    check.same_bits(one.moe_experts(x, indices, weights, gate_up, down), whole)


def test_unaligned_strided_and_repeatable(kernels, check, isa, dtype):
    x, indices, weights, gate_up, down = make(check, dtype, 6, 50, 20, 4, 2, offset=1)
    wide = check.randn(6, 60, dtype=dtype)
    wide[:, 5:55] = x
    run = kernels.on(isa).moe_experts
    first = run(x, indices, weights, gate_up, down)
    check.same_bits(run(wide[:, 5:55], indices, weights, gate_up, down), first)
    check.same_bits(run(x, indices, weights, gate_up, down), first)


def test_no_tokens(kernels, check, isa, dtype):
    args = make(check, dtype, 0, 16, 8, 4, 2)
    assert kernels.on(isa).moe_experts(*args).shape == (0, 16)
