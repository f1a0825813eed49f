"""attention: against fp64 for every kind of mask, group, split and block edge; cost that follows the visible keys."""

import pytest
import torch

# (B, H, G, S, L, D): groups 1, 2, 4, 5, 8, 16; one and many queries; lengths around the key block of 64.
SHAPES = [
    (1, 2, 2, 1, 1, 2), (1, 4, 4, 3, 10, 32), (2, 16, 8, 1, 300, 128), (1, 8, 4, 70, 70, 64), (2, 4, 1, 5, 63, 64),
    (1, 5, 1, 3, 130, 80), (1, 10, 2, 20, 65, 36), (1, 8, 1, 1, 1100, 128), (2, 16, 1, 9, 65, 64),
    (1, 16, 1, 1, 64, 256), (1, 2, 1, 40, 129, 250), (1, 6, 2, 50, 300, 128), (3, 2, 2, 1, 1025, 16),
    (1, 16, 8, 1, 2100, 32),
]  # fmt: skip


def bias_of(shape, mask, positions, is_causal):
    """Everything that hides keys, as one additive fp64 tensor [B, H, S, L]."""
    b, h, _, s, length, _ = shape
    bias = torch.zeros(b, h, s, length, dtype=torch.float64)
    keys = torch.arange(length)
    if mask is not None:
        full = mask.expand(b, h, s, length)
        bias = bias.masked_fill(~full, -torch.inf) if mask.dtype == torch.bool else bias + full.double()
    if positions is not None:
        bias = bias.masked_fill(keys[None, :] > positions[:, None], -torch.inf)
    if is_causal:
        bias = bias.masked_fill(keys[None, :] > torch.arange(s)[:, None], -torch.inf)
    return bias


def exact(q, k, v, bias, scale):
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    score_size = q.double().abs() @ k.abs().transpose(-1, -2) * scale
    probs = (scores + bias).softmax(-1).nan_to_num()
    return probs @ v, probs @ v.abs(), score_size.max()


def compare(kernels, check, shape, dtype, mask=None, positions=None, is_causal=False, tensors=None):
    b, h, g, s, length, d = shape
    q, k, v = tensors or (
        check.randn(b, h, s, d, dtype=dtype),
        check.randn(b, g, length, d, dtype=dtype),
        check.randn(b, g, length, d, dtype=dtype),
    )
    out = kernels.attention(q, k, v, mask, positions, is_causal)
    expected, size, score_size = exact(q, k, v, bias_of(shape, mask, positions, is_causal), d**-0.5)
    # A score is off by 2(D + 4) u32 of its terms (plus its own rounding after scale and bias), and a probability by
    # twice as much relatively, once for itself and once through the sum; bf16 probabilities round once to bf16.
    extra = 4 * (2 * (d + 8) * check.unit(torch.float32)) * (score_size + 1)
    extra = extra + (check.unit(torch.bfloat16) if dtype == torch.bfloat16 else 0)
    # Where all that a row sees has the least float16 added, sums with it keep steps of its last digit.
    least = torch.finfo(torch.float16).min
    alone = bias_of(shape, mask, positions, is_causal).amax(-1, keepdim=True) == least
    extra = extra + 4 * alone * -least * check.unit(torch.float32)
    check.dot_close(out, expected, size, terms=length + 8, extra=extra)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_without_mask(kernels, check, isa, dtype, shape, is_causal):
    compare(kernels.on(isa), check, shape, dtype, is_causal=is_causal)


@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_masks_shared_and_per_head(kernels, check, isa, dtype, shape, kind):
    b, h, _, s, length, _ = shape
    for heads, queries in ((1, s), (h, 1)):
        visible = torch.rand(b, heads, queries, length) > 0.3
        visible[:, :, 0, length // 2 :] = False  # a row that ends early
        visible[0, 0, queries - 1] = False  # a row that sees nothing
        numbers = torch.randn(visible.shape).masked_fill(~visible, -torch.inf)
        mask = visible if kind == torch.bool else numbers.to(kind)
        out = compare(kernels.on(isa), check, shape, dtype, mask)
        assert (out[0, 0, queries - 1 if queries > 1 else slice(None)] == 0).all()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] >= s[3]], ids=str)
def test_positions_with_left_padding(kernels, check, isa, dtype, shape):
    b, _, _, s, length, _ = shape
    positions = torch.arange(s) + (length - s) // 2
    mask = torch.ones(b, 1, 1, length, dtype=torch.bool)
    mask[-1, ..., : length // 4] = False
    compare(kernels.on(isa), check, shape, dtype, mask, positions)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
def test_finite_mask_minimum_hides_but_weighs_when_alone(kernels, check, isa, dtype, kind):
    shape = (2, 4, 2, 3, 200, 32)
    mask = torch.zeros(2, 1, 3, 200, dtype=kind)
    mask[..., 150:] = torch.finfo(kind).min
    mask[1, 0, 1] = torch.finfo(kind).min  # everything equally hidden: in float32 the plain mean, as in eager
    out = compare(kernels.on(isa), check, shape, dtype, mask)
    assert (out[1, :, 1] != 0).any()


def test_strides_transposed_cache_and_unaligned(kernels, check, isa, dtype):
    shape = (2, 8, 2, 6, 90, 64)
    b, h, g, s, length, d = shape
    q = check.randn(b, s, h, d + 2, dtype=dtype, offset=1)[..., :d].transpose(1, 2)
    k = check.randn(b, length + 7, g, d, dtype=dtype, offset=1)[:, :length].transpose(1, 2)
    v = check.randn(b, g, length + 3, d + 4, dtype=dtype, offset=3)[:, :, :length, 2 : d + 2]
    mask = (torch.rand(b, 1, s, length + 9) > 0.4)[..., 4 : length + 4]
    compare(kernels.on(isa), check, shape, dtype, mask, tensors=(q, k, v))


def test_batch_order_and_repetition_keep_the_bits(kernels, check, isa, dtype):
    b, h, g, s, length, d = 5, 8, 2, 3, 400, 64
    q, k, v = (check.randn(b, n, t, d, dtype=dtype) for n, t in ((h, s), (g, length), (g, length)))
    mask = torch.arange(length) < torch.tensor([400, 10, 100, 65, 64]).view(5, 1, 1, 1)
    run = kernels.on(isa).attention
    out, order = run(q, k, v, mask), torch.tensor([3, 1, 4, 0, 2])
    check.same_bits(run(q, k, v, mask), out)
    check.same_bits(run(q[order], k[order], v[order], mask[order]), out[order])


@pytest.mark.parametrize("queries", [1, 7])
def test_what_is_not_visible_is_not_read(kernels, check, isa, dtype, queries):
    """Keys outside the visible span hold NaN: reading one shows."""
    b, h, g, length, d = 2, 8, 2, 700, 32
    q, k, v = (check.randn(b, n, t, d, dtype=dtype) for n, t in ((h, queries), (g, length), (g, length)))
    for t in (k, v):
        t[:, :, :134] = torch.nan
        t[:, :, 300:] = torch.nan
    mask = torch.zeros(b, 1, queries, length, dtype=torch.bool)
    mask[..., 134:300] = True
    clean = kernels.on(isa).attention(
        q, k[:, :, 128:300].nan_to_num(), v[:, :, 128:300].nan_to_num(), mask[..., 128:300]
    )
    # The first block starts at 128: its hidden keys 128..133 are read, so compare with those set to zero.
    k[:, :, 128:134], v[:, :, 128:134] = 0, 0
    out = kernels.on(isa).attention(q, k, v, mask)
    assert not out.isnan().any()
    check.same_bits(out, clean)


@pytest.mark.parametrize("length", [130, 256])
@pytest.mark.parametrize("d", [36, 64, 80])
def test_nothing_past_a_row_is_read(kernels, check, isa, dtype, length, d):
    """NaN beside each row of q, k and v: a row read too far shows."""
    shape = (1, 4, 2, 20, length, d)
    wide = [
        torch.full((1, heads, rows, d + 10), torch.nan).to(dtype) for heads, rows in ((4, 20), (2, length), (2, length))
    ]
    for t in wide:
        t[..., :d] = torch.randn(t[..., :d].shape).to(dtype)
    compare(kernels.on(isa), check, shape, dtype, tensors=tuple(t[..., :d] for t in wide))


def test_large_scores_do_not_overflow(kernels, check, isa, dtype):
    q = torch.full((1, 2, 2, 64), 60.0, dtype=dtype)
    k, v = torch.full((1, 1, 100, 64), 60.0, dtype=dtype), torch.ones(1, 1, 100, 64, dtype=dtype)
    k[0, 0, 50:] = -60.0
    assert torch.equal(kernels.on(isa).attention(q, k, v), torch.ones(1, 2, 2, 64, dtype=dtype))


@pytest.mark.parametrize("group", [2, 8, 12])
def test_scores_that_grow_from_block_to_block(kernels, check, isa, dtype, group):
    """The maximum moves in every block, and what was summed before is scaled down."""
    shape = (2, group, 1, 1, 700, 64)
    q, k, v = (check.randn(2, n, t, 64, dtype=dtype) for n, t in ((group, 1), (1, 700), (1, 700)))
    k = (k + q[:, :1] * torch.arange(700).div(700).view(1, 1, 700, 1)).to(dtype)
    compare(kernels.on(isa), check, shape, dtype, tensors=(q, k, v))


@pytest.mark.parametrize("group", [1, 4, 9])
def test_what_is_not_finite_shows(kernels, check, isa, dtype, group):
    """A NaN in a key everywhere; in a value, or an infinity there, in its own column alone."""
    q, k, v = (check.randn(1, n, t, 32, dtype=dtype) for n, t in ((group, 1), (1, 200), (1, 200)))
    k[0, 0, 150, 3] = torch.nan
    assert kernels.on(isa).attention(q, k, v).isnan().all()
    k[0, 0, 150, 3], v[0, 0, 10, 5] = 0, torch.nan
    out = kernels.on(isa).attention(q, k, v)
    assert out[..., 5].isnan().all()
    assert out.isnan().sum() == group
    v[0, 0, 10, 5] = torch.inf
    out = kernels.on(isa).attention(q, k, v)
    assert (out[..., 5] == torch.inf).all()
    assert out.isfinite().sum() == 31 * group


def test_no_keys_gives_zeros(kernels, check, isa, dtype):
    q, k = check.randn(1, 2, 3, 16, dtype=dtype), check.randn(1, 2, 0, 16, dtype=dtype)
    assert (kernels.on(isa).attention(q, k, k) == 0).all()


def test_arguments_are_checked(kernels):
    C = kernels.C
    with pytest.raises(ValueError, match=r"attention: head size 258; it must be even and 2\.\.256"):
        C.attention_scratch_bytes(1, 2, 2, 1, 1, 258, 1)
    with pytest.raises(ValueError, match="attention: 5 query heads and 2 key/value heads; the first must be"):
        C.attention_scratch_bytes(1, 5, 2, 1, 1, 64, 1)
