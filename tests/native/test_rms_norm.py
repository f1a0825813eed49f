"""rms_norm and add_rms_norm: the reference's cast order, within one step of the reference computed by torch."""

import pytest
import torch

EPS = 1e-6
SHAPES = [(1, 1), (3, 7), (2, 31), (5, 128), (4, 1000), (70, 1024)]


def reference(x, weight):
    h = x.float()
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * n.to(x.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(kernels, check, isa, dtype, shape):
    x, weight = check.randn(*shape, dtype=dtype), check.randn(shape[1], dtype=dtype)
    # The mean is summed in another order: (cols + 4) roundings of fp32, halved by the root; 16 bits may then round
    # apart by one step before the weight and one after it.
    steps = 2 if dtype != torch.float32 else 4 + shape[1] ** 0.5
    assert check.ulps(kernels.on(isa).rms_norm(x, weight, EPS), reference(x, weight)) <= steps


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_nearly_always_equal(kernels, check, isa, kind):
    x, weight = check.randn(64, 1024, dtype=kind), check.randn(1024, dtype=kind)
    check.rarely_apart(kernels.on(isa).rms_norm(x, weight, EPS), reference(x, weight), 1024**0.5)


def test_strided_rows_and_offset(kernels, check, isa, dtype):
    x = check.randn(6, 130, dtype=dtype, offset=1)[:, :101]
    weight = check.randn(101, dtype=dtype, offset=1)
    check.same_bits(kernels.on(isa).rms_norm(x, weight, EPS), kernels.on(isa).rms_norm(x.contiguous(), weight, EPS))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_is_exact_and_feeds_the_norm(kernels, check, isa, dtype, shape):
    x = check.randn(shape[0], shape[1] + 5, dtype=dtype)[:, : shape[1]]
    residual, weight = check.randn(*shape, dtype=dtype), check.randn(shape[1], dtype=dtype)
    out, total = kernels.on(isa).add_rms_norm(x, residual, weight, EPS)
    check.same_bits(total, residual + x)
    check.same_bits(out, kernels.on(isa).rms_norm(total, weight, EPS))


def test_zero_rows_large_values_and_nan(kernels, isa, dtype):
    x = torch.zeros(3, 64, dtype=dtype)
    x[1] = min(1e18, torch.finfo(dtype).max)
    x[2, 5] = torch.nan
    out = kernels.on(isa).rms_norm(x, torch.ones(64, dtype=dtype), EPS)
    assert (out[0] == 0).all()
    assert (out[1] == 1).all()
    assert out[2].isnan().all()
    assert kernels.on(isa).rms_norm(x[:0], x[0], EPS).shape == (0, 64)
