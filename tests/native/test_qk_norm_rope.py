"""qk_norm_rope: equal to the reference step by step, with strided heads and shared or per-batch positions."""

import pytest
import torch

EPS = 1e-6


def reference(x, weight, cos, sin):
    h = x.float()
    n = weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    half = x.shape[-1] // 2
    rotated = torch.cat((-n[..., half:], n[..., :half]), -1)
    return n * cos.unsqueeze(2) + rotated * sin.unsqueeze(2)


def inputs(check, dtype, b, s, h, g, d, batch_positions):
    q, k = check.randn(b, s, h, d, dtype=dtype), check.randn(b, s, g, d, dtype=dtype)
    angles = torch.rand(b if batch_positions else 1, s, d // 2) * 6.3
    cos, sin = (torch.cat((t, t), -1).to(dtype) for t in (angles.cos(), angles.sin()))
    return q, k, check.randn(d, dtype=dtype), check.randn(d, dtype=dtype), cos, sin


def bound(q, weight, cos, sin, check, roundings):
    """Each output is the sum of two products; each factor of them went through a few roundings."""
    h = q.float()
    n = (weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS))).abs()
    half = q.shape[-1] // 2
    rotated = torch.cat((n[..., half:], n[..., :half]), -1)
    size = n * cos.unsqueeze(2).abs() + rotated * sin.unsqueeze(2).abs()
    return roundings * 2 * check.unit(q.dtype) * size + 1e-30


@pytest.mark.parametrize("d", [2, 10, 16, 64, 80, 128, 256])
@pytest.mark.parametrize("batch_positions", [False, True], ids=["shared", "batch"])
def test_matches_the_reference(kernels, check, isa, dtype, d, batch_positions):
    q, k, q_weight, k_weight, cos, sin = inputs(check, dtype, 2, 3, 4, 2, d, batch_positions)
    q_out, k_out = kernels.on(isa).qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS)
    for out, x, weight in ((q_out, q, q_weight), (k_out, k, k_weight)):
        error = (out.float() - reference(x, weight, cos, sin).float()).abs()
        # The root mean square differs by the order of a sum: a rounding may fall the other way at each of four places.
        assert (error <= bound(x, weight, cos, sin, check, 4 + (d**0.5 if dtype == torch.float32 else 0))).all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_nearly_always_equal(kernels, check, isa, kind):
    q, k, q_weight, k_weight, cos, sin = inputs(check, kind, 1, 64, 16, 8, 128, False)
    q_out, k_out = kernels.on(isa).qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS)
    # Of the roundings behind the norm, four are behind the sum: weight, two products with the angle, and their sum.
    check.rarely_apart(q_out, reference(q, q_weight, cos, sin), 4 * 128**0.5)
    check.rarely_apart(k_out, reference(k, k_weight, cos, sin), 4 * 128**0.5)


def test_strides(kernels, check, isa, dtype):
    b, s, h, g, d = 2, 5, 4, 2, 32
    _, _, q_weight, k_weight, cos, sin = inputs(check, dtype, b, s, h, g, d, False)
    packed = check.randn(b, s, (h + g) * d + 3, dtype=dtype, offset=1)
    q = packed[..., : h * d].view(b, s, h, d)
    k = packed[..., h * d : (h + g) * d].view(b, s, g, d)
    wide = torch.stack((cos, sin), 2)  # cos rows are not contiguous here
    run = kernels.on(isa).qk_norm_rope
    strided = run(q, k, q_weight, k_weight, wide[:, :, 0], wide[:, :, 1], EPS)
    plain = run(q.contiguous(), k.contiguous(), q_weight, k_weight, cos, sin, EPS)
    check.same_bits(strided[0], plain[0])
    check.same_bits(strided[1], plain[1])


def test_odd_head_size_is_named(kernels, check):
    q, k, q_weight, k_weight, cos, sin = inputs(check, torch.float32, 1, 1, 1, 1, 4, False)
    with pytest.raises(ValueError, match="qk_norm_rope: head size 3; it must be even and at least 2"):
        kernels.qk_norm_rope(q[..., :3], k[..., :3], q_weight, k_weight, cos, sin, EPS)
