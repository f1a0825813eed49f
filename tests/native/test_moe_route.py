"""moe_route: the softmax and the choice of torch, ties to the lower index, odd numbers of experts."""

import pytest
import torch


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 3), (5, 128, 8), (2, 130, 16), (70, 60, 4), (2, 250, 5)], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "norm"])
def test_matches_torch(kernels, check, isa, dtype, shape, norm):
    t, e, k = shape
    # Distinct logits that bfloat16 holds exactly, so that no two experts tie.
    logits = torch.stack([torch.randperm(e) for _ in range(t)]).to(dtype) / 16
    weights, indices = kernels.on(isa).moe_route(logits, k, norm)
    probs, expected = logits.double().softmax(-1).topk(k)
    if norm:
        probs = probs / probs.sum(-1, keepdim=True)
    assert torch.equal(indices, expected)
    check.dot_close(weights, probs, probs, terms=e + k)


def test_ties_go_to_the_lower_index(kernels, isa, dtype):
    logits = torch.zeros(2, 37, dtype=dtype)
    logits[1, [5, 20, 30]] = 1.0
    _, indices = kernels.on(isa).moe_route(logits, 4, True)
    assert indices.tolist() == [[0, 1, 2, 3], [5, 20, 30, 0]]


def test_strided_logits_and_large_values(kernels, check, isa, dtype):
    logits = (300 * check.randn(4, 50, dtype=dtype, offset=1))[:, :33]
    weights, indices = kernels.on(isa).moe_route(logits, 2, False)
    again = kernels.on(isa).moe_route(logits.contiguous(), 2, False)
    check.same_bits(weights, again[0])
    assert torch.equal(indices, again[1])
    assert torch.equal(indices[:, 0], logits.float().argmax(-1))


def test_nan_logits_still_give_distinct_ids_in_range(kernels, isa, dtype):
    logits = torch.full((1, 9), torch.nan, dtype=dtype)
    _, indices = kernels.on(isa).moe_route(logits, 4, True)
    assert len(set(indices[0].tolist())) == 4
    assert set(indices[0].tolist()) <= set(range(9))


def test_top_k_is_checked(kernels):
    with pytest.raises(ValueError, match=r"moe_route: top 9 of 8 experts; top_k must be 1..8"):
        kernels.moe_route(torch.zeros(1, 8), 9, True)


def test_number_of_experts_is_checked(kernels):
    _, indices = kernels.moe_route(torch.arange(4096.0)[None], 2, True)
    assert indices.tolist() == [[4095, 4094]]
    with pytest.raises(ValueError, match=r"moe_route: 4097 experts; it must be 1..4096"):
        kernels.moe_route(torch.zeros(1, 4097), 2, True)
