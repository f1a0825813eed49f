"""linear: errors within what fp32 sums allow, bits that do not depend on the other rows, odd sizes and addresses."""

import pytest
import torch

from qwenopt import native

SHAPES = [
    (1, 1, 1), (1, 7, 33), (2, 64, 1024), (3, 5, 100), (4, 130, 257), (5, 66, 96), (6, 31, 64), (7, 9, 31),
    (8, 130, 768), (12, 65, 40), (16, 64, 512), (17, 3, 2048), (33, 70, 65), (70, 129, 128),
    (20, 47, 4300), (65, 300, 700), (530, 45, 300), (100, 70, 9000), (1100, 130, 70),
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


# From here on rows go in AMX tiles, or in floats where the type has no products: another order of the sum.
BLOCK_ROWS = {"amx": 4, "avx512": 33, "avx2": 33}


def block_rows(isa, dtype):
    name = native.ISA_NAMES[isa]
    if dtype == torch.float16 and name in ("amx", "avx512bf16"):
        name = "avx512"
    return BLOCK_ROWS.get(name, 1000) if dtype != torch.float32 else 1000


def test_row_bits_do_not_depend_on_other_rows(kernels, check, isa, dtype):
    blocks = block_rows(isa, dtype)
    x, weight = check.randn(600, 333, dtype=dtype), check.randn(70, 333, dtype=dtype)
    run = kernels.on(isa).linear
    alone, whole = torch.cat([run(x[i : i + 1], weight) for i in range(40)]), run(x, weight)
    for m in (2, 3, 4, 7, 16, 40):
        check.same_bits(run(x[:m], weight), (whole if m >= blocks else alone)[:m])
    for m in (65, 290):
        check.same_bits(run(x[:m], weight), whole[:m])
    order = torch.randperm(600)
    check.same_bits(run(x[order], weight), whole[order])
    others = torch.full_like(x, torch.nan)
    others[17] = x[17]
    check.same_bits(run(others, weight)[17], whole[17])


def test_row_bits_do_not_depend_on_how_k_is_cut(kernels, check, isa, dtype):
    """Few rows take k in blocks of 4096, many in blocks of 512."""
    x, weight = check.randn(300, 5000, dtype=dtype), check.randn(64, 5000, dtype=dtype)
    run = kernels.on(isa).linear
    check.same_bits(run(x[:40], weight), run(x, weight)[:40])


def test_column_bits_do_not_depend_on_threads(kernels, check, isa, dtype):
    one = kernels.on(isa)
    one.threads = 1
    for rows in (3, 5, 70):
        x, weight = check.randn(rows, 1024, dtype=dtype), check.randn(1500, 1024, dtype=dtype)
        check.same_bits(kernels.on(isa).linear(x, weight), one.linear(x, weight))


@pytest.mark.parametrize("rows", [5, 70])
def test_nothing_past_the_operands_is_read(kernels, check, isa, dtype, rows):
    """NaN beside each row and past the last one: a row of x or of weights read too far shows."""
    x, weight = torch.full((rows + 30, 150), torch.nan).to(dtype), torch.full((83, 150), torch.nan).to(dtype)
    x[:rows, :141], weight[:53, :141] = torch.randn(rows, 141).to(dtype), torch.randn(53, 141).to(dtype)
    x, weight = x[:rows, :141], weight[:53, :141]
    check.dot_close(kernels.on(isa).linear(x, weight), *exact(x, weight), terms=142)


def test_no_rows_and_no_terms(kernels, check, isa, dtype):
    weight = check.randn(4, 8, dtype=dtype)
    assert kernels.on(isa).linear(check.randn(0, 8, dtype=dtype), weight).shape == (0, 4)
    empty = kernels.on(isa).linear(check.randn(2, 0, dtype=dtype), weight[:, :0])
    assert torch.equal(empty, torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even_and_keeps_nan(kernels, check, isa, kind):
    # One product by 1.0: what is left is the rounding of the bias sum.
    x, half = torch.ones(1, 1, dtype=kind), check.unit(kind)
    weight = torch.tensor([[1.0], [1.0], [float("nan")], [float("inf")], [-1.0]], dtype=kind)
    bias = torch.tensor([half, 3 * half, 1.0, 1.0, -half], dtype=kind)
    out = kernels.on(isa).linear(x, weight, bias)[0]
    expected = torch.tensor([1.0, 1 + 4 * half, torch.nan, torch.inf, -1.0], dtype=kind)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_float16_overflows_to_infinity_as_in_eager(kernels, isa):
    """65519 rounds to the largest number there is, 65520 to infinity; what is larger on the way alone is none."""
    x = torch.tensor([[1.0, 256.0, -256.0]], dtype=torch.float16)
    weight = torch.tensor([[65504, 0, 0], [65504, 15 / 256, 0], [65504, 16 / 256, 0], [0, 256, 0], [0, 0, 300],
                           [1, 300, 300]], dtype=torch.float16)  # fmt: skip
    found = kernels.on(isa).linear(x, weight)
    assert torch.equal(found, torch.nn.functional.linear(x, weight))
    assert found[0].tolist() == [65504, 65504, torch.inf, torch.inf, -torch.inf, 1]


def test_arguments_are_checked(kernels):
    C = kernels.C
    with pytest.raises(ValueError, match=r"linear: dtype code 7; dtype must be 0 \(float32\), 1 \(bfloat16\) or 2"):
        C.linear(8, 8, 0, 8, 0, 1, 1, 1, 1, 1, 1, 7, 1)
    with pytest.raises(ValueError, match="linear: x is a null pointer"):
        C.linear(0, 8, 0, 8, 0, 1, 1, 1, 1, 1, 1, 0, 1)
    with pytest.raises(ValueError, match="linear: N is 0; it must be at least 1"):
        C.linear(8, 8, 0, 8, 0, 1, 0, 1, 1, 1, 1, 0, 1)
    with pytest.raises(ValueError, match="linear: 0 threads; threads must be at least 1"):
        C.linear(8, 8, 0, 8, 0, 1, 1, 1, 1, 1, 1, 0, 0)
    if native.cpu_isa() in BLOCK_ROWS:
        with pytest.raises(ValueError, match="linear: scratch is a null pointer"):
            C.linear(8, 8, 0, 8, 0, 64, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="linear_scratch_bytes: N is 0; it must be at least 1"):
        C.linear_scratch_bytes(1, 0, 1, 1, 1)
