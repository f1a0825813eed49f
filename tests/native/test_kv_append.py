"""kv_append: every slot gets its token, bit for bit, and nothing else is touched."""

import pytest
import torch

from qwenopt.testing.paged import quantized

POOL_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def make_pools(pages, groups, page_size, dim, kind):
    shape = (pages, groups, page_size, dim)
    if kind == torch.int8:
        return *(torch.full(shape, -9, dtype=kind) for _ in range(2)), *(torch.full(shape[:3], -9.0) for _ in range(2))
    return *(torch.full(shape, -9.0, dtype=kind) for _ in range(2)), None, None


def expected(pools, k, v, slots):
    made = [None if t is None else t.clone() for t in pools]
    page_size, kind = pools[0].shape[2], pools[0].dtype
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        b, s, page, place = t // k.shape[2], t % k.shape[2], slot // page_size, slot % page_size
        for x, pool, scale in ((k, made[0], made[2]), (v, made[1], made[3])):
            token = x[b, :, s]
            if kind == torch.int8:
                pool[page, :, place], scale[page, :, place] = quantized(token)
            else:
                pool[page, :, place] = token.to(kind)
    return made


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a is b is None or torch.equal(a, b)


# (B, G, S, D): one token, several, more than one thread's worth, odd sizes, none.
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 1, 128), (2, 3, 7, 36), (2, 8, 40, 64), (1, 2, 0, 8),
                                   (1, 1, 3, 250)], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", POOL_DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_tokens_go_to_their_slots(kernels, check, isa, dtype, shape, kind, page_size):
    b, g, s, d = shape
    # As a model lays them out: transposed from [B, S, G, D], a part of a wider tensor.
    k, v = (check.randn(b, s, g + 1, d + 3, dtype=dtype)[:, :, 1:, 2 : d + 2].transpose(1, 2) for _ in range(2))
    pools = make_pools(b * s // page_size + 3, g, page_size, d, kind)
    slots = torch.randperm(pools[0].shape[0] * page_size)[: b * s]
    if b * s > 1:
        slots[0], slots[-1] = -1, -(2**62)
    wanted = expected(pools, k, v, slots)
    kernels.on(isa).kv_append(pools, k, v, slots)
    same(pools, wanted)


def test_strided_pools(kernels, check, isa, dtype):
    """A layer's part of one tensor of all layers, heads beside tokens."""
    whole = torch.full((5, 4, 16, 3, 2, 40), -9.0, dtype=dtype)  # [pages, layers, page_size, keys or values, G, D]
    k_pool, v_pool = (whole[:, 2, :, n, :, 4:36].transpose(1, 2) for n in (0, 2))
    k, v = (check.randn(1, 2, 6, 32, dtype=dtype) for _ in range(2))
    slots = torch.tensor([3, -1, 79, 16, 15, 40])
    wanted = expected((k_pool, v_pool, None, None), k, v, slots)
    kernels.on(isa).kv_append((k_pool, v_pool, None, None), k, v, slots)
    same((k_pool, v_pool), wanted[:2])
    k_pool.fill_(-9.0), v_pool.fill_(-9.0)
    assert (whole == -9).all()


@pytest.mark.parametrize("bad", [32, 1 << 40, (1 << 63) - 1])
@pytest.mark.parametrize("tokens", [2, 200])
@pytest.mark.parametrize("kind", POOL_DTYPES, ids=str)
def test_a_slot_that_the_pool_has_not_is_named(kernels, check, dtype, bad, tokens, kind):
    pools = make_pools(2, 2, 16, 64, kind)
    k = check.randn(1, 2, tokens, 64, dtype=dtype)
    slots = torch.full((tokens,), -1)
    slots[0], slots[-1] = 3, bad
    text = rf"kv_append: token {tokens - 1} goes to slot {bad} of a pool of 32; slots must be 0\.\.31, or negative"
    with pytest.raises(IndexError, match=text):
        kernels.kv_append(pools, k, k, slots)
    assert all((t == -9).all() for t in pools if t is not None), "written although a slot is wrong"


def test_codes_of_zeros_tiny_and_large_numbers(kernels, isa, dtype):
    x = torch.zeros(1, 1, 6, 32)
    x[0, 0, 1, 3] = 1e-30
    x[0, 0, 2] = 3e38 * torch.linspace(-1, 1, 32)
    x[0, 0, 3, ::2], x[0, 0, 3, 5] = 2.5, 127.0  # halves: to even
    x[0, 0, 4, 7] = 1e-38
    x[0, 0, 5, 0] = torch.nan
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    pools = make_pools(1, 1, 16, 32, torch.int8)
    kernels.on(isa).kv_append(pools, x, x, torch.arange(6))
    codes, scales = pools[0][0, 0, :6], pools[2][0, 0, :6]
    assert scales[5].isnan(), "a NaN must not become a number"
    found, true = codes[:5].float() * scales[:5, None], x[0, 0, :5].float()
    assert (found - true).abs().le(true.abs().amax(-1, keepdim=True) / 253 + 4e-37).all()
    assert codes[3, :6].tolist() == [2, 0, 2, 0, 2, 127]
    assert torch.equal(pools[0], pools[1])
    assert torch.equal(pools[2].nan_to_num(), pools[3].nan_to_num())


def test_every_float16_is_read_and_written_as_by_torch(kernels, isa):
    """All bit patterns; and of float32 the numbers, what lies halfway between two of them, and what is next to that."""
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    numbers = halves[halves.isfinite()].float().sort()[0]
    between = torch.cat([(numbers[1:] + numbers[:-1]) / 2, torch.tensor([65520.0, -65520.0, 1e30, torch.nan])])
    near = [between, *(torch.nextafter(between, torch.tensor(way)) for way in (-torch.inf, torch.inf))]
    for given, kind in ((halves, torch.float32), (torch.cat([numbers, *near]), torch.float16)):
        x = torch.nn.functional.pad(given, (0, -len(given) % 256)).view(1, 1, -1, 256)
        pools = make_pools(1, 1, x.shape[2], 256, kind)
        kernels.on(isa).kv_append(pools, x, x, torch.arange(x.shape[2]))
        torch.testing.assert_close(pools[0][0, 0], x[0, 0].to(kind), rtol=0, atol=0, equal_nan=True)


def test_arguments_are_checked(kernels):
    with pytest.raises(ValueError, match=r"kv_append: pool dtype code 4; it must be 0 \(float32\), 1 \(bfloat16\)"):
        kernels.C.kv_append(*[1] * 7, 1, 1, 1, 1, 1, 1, *[1] * 12, 4, 0, 1)
    with pytest.raises(ValueError, match="kv_append: slots is a null pointer"):
        kernels.C.kv_append(*[1] * 6, 0, 1, 1, 1, 1, 1, 1, *[1] * 12, 0, 0, 1)
