"""linear: errors within what fp32 sums allow, bits that do not depend on the other rows, odd sizes and addresses."""

import pytest
import torch

SHAPES = [
    (1, 1, 1), (1, 7, 33), (2, 64, 1024), (3, 5, 100), (4, 130, 257), (5, 66, 96), (6, 31, 64), (7, 9, 31),
    (8, 130, 768), (12, 65, 40), (16, 64, 512), (17, 3, 2048), (33, 70, 65), (70, 129, 128),
]  # fmt: skip


def exact(x, weight, bias=None):
    out = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    return (out, magnitude) if bias is None else (out + bias.double(), magnitude + bias.double().abs())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_matches_fp64(kernels, check, isa, dtype, shape, with_bias):
    m, n, k = shape
    x, weight = check.randn(m, k, dtype=dtype), check.randn(n, k, dtype=dtype)
    bias = check.randn(n, dtype=dtype) if with_bias else None
    check.dot_close(kernels.on(isa).linear(x, weight, bias), *exact(x, weight, bias), terms=k + 1)


def test_unaligned_and_strided(kernels, check, isa, dtype):
    x = check.randn(5, 80, dtype=dtype, offset=1)[:, :77]
    weight = check.randn(19, 90, dtype=dtype, offset=3)[:, :77]
    bias = check.randn(19, dtype=dtype, offset=1)
    check.dot_close(kernels.on(isa).linear(x, weight, bias), *exact(x, weight, bias), terms=78)


def test_row_bits_do_not_depend_on_other_rows(kernels, check, isa, dtype):
    x, weight = check.randn(40, 333, dtype=dtype), check.randn(70, 333, dtype=dtype)
    run = kernels.on(isa).linear
    alone = torch.cat([run(x[i : i + 1], weight) for i in range(40)])
    for m in (2, 3, 7, 16, 40):
        check.same_bits(run(x[:m], weight), alone[:m])
    order = torch.randperm(40)
    check.same_bits(run(x[order], weight), alone[order])


def test_column_bits_do_not_depend_on_threads(kernels, check, isa, dtype):
    x, weight = check.randn(3, 1024, dtype=dtype), check.randn(1500, 1024, dtype=dtype)
    one = kernels.on(isa)
    one.threads = 1
    check.same_bits(kernels.on(isa).linear(x, weight), one.linear(x, weight))


def test_no_rows_and_no_terms(kernels, check, isa, dtype):
    weight = check.randn(4, 8, dtype=dtype)
    assert kernels.on(isa).linear(check.randn(0, 8, dtype=dtype), weight).shape == (0, 4)
    empty = kernels.on(isa).linear(check.randn(2, 0, dtype=dtype), weight[:, :0])
    assert torch.equal(empty, torch.zeros(2, 4, dtype=dtype))


def test_rounds_to_nearest_even_and_keeps_nan(kernels, isa):
    # One product by 1.0: what is left is the rounding of the bias sum.
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[1.0], [1.0], [float("nan")], [float("inf")], [-1.0]], dtype=torch.bfloat16)
    bias = torch.tensor([2.0**-8, 3 * 2.0**-8, 1.0, 1.0, -(2.0**-8)], dtype=torch.bfloat16)
    out = kernels.on(isa).linear(x, weight, bias)[0]
    expected = torch.tensor([1.0, 1.015625, torch.nan, torch.inf, -1.0], dtype=torch.bfloat16)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_arguments_are_checked(kernels):
    C = kernels.C
    with pytest.raises(ValueError, match=r"linear: dtype code 7; dtype must be 0 \(float32\) or 1 \(bfloat16\)"):
        C.linear(8, 8, 0, 8, 1, 1, 1, 1, 1, 1, 7, 1)
    with pytest.raises(ValueError, match="linear: x is a null pointer"):
        C.linear(0, 8, 0, 8, 1, 1, 1, 1, 1, 1, 0, 1)
    with pytest.raises(ValueError, match="linear: N is 0; it must be at least 1"):
        C.linear(8, 8, 0, 8, 1, 0, 1, 1, 1, 1, 0, 1)
    with pytest.raises(ValueError, match="linear: 0 threads; threads must be at least 1"):
        C.linear(8, 8, 0, 8, 1, 1, 1, 1, 1, 1, 0, 0)
