"""silu_mul: the exponential over the whole range, the cast order, strides."""

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 100), (2, 3072)], ids=str)
def test_matches_the_reference(kernels, check, isa, dtype, shape):
    gate, up = 4 * check.randn(*shape, dtype=dtype), check.randn(*shape, dtype=dtype)
    expected = (F.silu(gate.double()).to(dtype) * up).to(dtype)
    # fp32: exp, add and divide round, about 4 units in all, and the product once more; 16 bits: one step each side.
    assert check.ulps(kernels.on(isa).silu_mul(gate, up), expected) <= (8 if dtype == torch.float32 else 2)


def test_exponential_over_the_whole_range(kernels, check, isa):
    gate = torch.cat([torch.linspace(-110, 110, 100001), torch.logspace(-30, 2, 5000), -torch.logspace(-30, 2, 5000)])
    gate = gate[None]
    out = kernels.on(isa).silu_mul(gate, torch.ones_like(gate))
    exact = F.silu(gate.double())
    finite = gate > -88  # below, exp(-x) is more than a float holds (in torch too) and the result a tiny number or zero
    relative = ((out.double() - exact).abs() / exact.abs())[finite]
    # exp 1.5 ulp, the sum 0.5, the quotient 0.5, each at most one unit of 2^-23.
    assert relative.max() < 3 * 2.0**-23
    assert (out[~finite] <= 0).all()
    assert (out[~finite] > -1e-35).all()


def test_infinities_and_nan(kernels, isa, dtype):
    large = min(1e30, torch.finfo(dtype).max)
    gate = torch.tensor([[float("inf"), large, -large, float("nan"), 0.0, 100.0]], dtype=dtype)
    out = kernels.on(isa).silu_mul(gate, torch.ones_like(gate))[0]
    expected = torch.tensor([torch.inf, large, 0.0, torch.nan, 0.0, 100.0], dtype=dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_cast_order(kernels, check, isa, kind):
    gate, up = check.randn(64, 512, dtype=kind), check.randn(64, 512, dtype=kind)
    check.rarely_apart(kernels.on(isa).silu_mul(gate, up), F.silu(gate) * up, 2 * 4)  # see above: 4 units each


def test_strided_halves_of_one_tensor(kernels, check, isa, dtype):
    both = check.randn(7, 86, dtype=dtype, offset=1)
    gate, up = both.chunk(2, -1)
    check.same_bits(kernels.on(isa).silu_mul(gate, up), kernels.on(isa).silu_mul(gate.contiguous(), up.contiguous()))
