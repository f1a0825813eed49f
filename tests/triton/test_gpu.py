"""The Triton providers on a GPU, as `Op.choose` picks them: against float64, against eager, in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import KV_APPEND, PAGED_ATTENTION
from qwenopt.testing.ragged import Ragged
from qwenopt.testing.tolerance import assert_as_accurate

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
DECODE = Ragged((37, 5, 1300, 1, 640), (1, 1, 1, 1, 1), heads=32, kv_heads=4, head_dim=128)
LONG = Ragged((1200, 17, 900), (1000, 1, 900), heads=32, kv_heads=4, head_dim=128, padding=3)
BATCHES = {
    "decode": DECODE,
    **{f"groups {h}/{g}": DECODE.but(heads=h, kv_heads=g) for h, g in ((16, 8), (32, 8), (40, 8), (64, 8), (64, 4))},
    **{f"page_size {p}": DECODE.but(page_size=p) for p in (32, 64, 256)},
    **{f"head_dim {d}": DECODE.but(head_dim=d) for d in (64, 72, 256)},
    "chunk": Ragged((900,), (30,), heads=32, kv_heads=4, head_dim=128),
    "prefill": LONG,
    "prefill pages of 64": LONG.but(page_size=64),
    "prefill head_dim 64": LONG.but(head_dim=64, heads=16, kv_heads=8),
    "window": LONG.but(window=100),
    "decode window": DECODE.but(window=100),
    "int8": DECODE.but(int8=True, page_size=64),
    "prefill int8": LONG.but(int8=True),
    "batch": Ragged((600, 600), (1, 1), heads=16, kv_heads=8, head_dim=128, packed=False),
    "batch prefill": Ragged((600, 600), (600, 600), heads=16, kv_heads=8, head_dim=128, packed=False),
}


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    q, k, v, *rest = args
    return (q.double(), *(pool if pool.dtype == torch.int8 else pool.double().nan_to_num() for pool in (k, v)), *rest)


def chosen(op: Any, args: tuple[Any, ...]) -> Any:
    choice = op.choose(args)
    assert choice.provider is not None, choice.reason
    assert choice.provider.name == "triton"
    return choice.provider.overload


@DTYPES
@pytest.mark.parametrize("name", BATCHES)
def test_paged_attention(name: str, dtype: torch.dtype) -> None:
    args = on_gpu(BATCHES[name].but(dtype=dtype).build())
    found = chosen(PAGED_ATTENTION, args)(*args)
    q, k, v, *rest = args
    eager = PAGED_ATTENTION.reference(q, k.nan_to_num(), v.nan_to_num(), *rest)
    assert_as_accurate(found.cpu(), eager.cpu(), PAGED_ATTENTION.reference(*in_float64(args)).cpu())
    again = chosen(PAGED_ATTENTION, args)(*args)
    assert torch.equal(found, again), "the same arguments give the same bits"


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("seq", [1, 300])
def test_paged_attention_with_a_mask(kind: str, seq: int) -> None:
    batch = Ragged((512, 512), (seq, seq), heads=16, kv_heads=8, head_dim=128, dtype=BF16, packed=False)
    *args, mask, window, scale = batch.build()
    num_keys = args[5].shape[1] * 16
    seen = torch.arange(num_keys) >= torch.tensor([3, 200])[:, None, None, None]
    mask = seen if kind == "bool" else torch.randn(2, 1, seq, num_keys, dtype=BF16)
    moved = on_gpu((*args, mask, window, scale))
    found = chosen(PAGED_ATTENTION, moved)(*moved)
    q, k, v, *rest = moved
    eager = PAGED_ATTENTION.reference(q, k.nan_to_num(), v.nan_to_num(), *rest)
    truth = list(in_float64(moved))
    truth[8] = truth[8].double() if kind == "additive" else truth[8]
    assert_as_accurate(found.cpu(), eager.cpu(), PAGED_ATTENTION.reference(*truth).cpu())


@pytest.mark.parametrize("pool", [torch.float32, torch.float16, BF16, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_kv_append(tokens: int, pool: torch.dtype) -> None:
    dtype = BF16 if pool == torch.int8 else pool
    shape = (70, 8, 16, 128)
    pools = [torch.zeros(shape, dtype=pool) for _ in range(2)]
    scales = [torch.zeros(shape[:3]) if pool == torch.int8 else None for _ in range(2)]
    k, v = (torch.randn(1, tokens, 8, 128).to(dtype).transpose(1, 2) for _ in range(2))
    slots = torch.randperm(70 * 16)[:tokens]
    slots[tokens // 2] = -1
    args = (*pools, *scales, k, v, slots)
    moved = on_gpu(args)
    chosen(KV_APPEND, moved)(*moved)
    KV_APPEND.reference(*args)
    for found, wanted in zip(moved, args, strict=True):
        if wanted is not None:
            assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("batch", [DECODE, LONG], ids=["decode", "prefill"])
def test_a_cuda_graph_serves_other_lengths(batch: Ragged) -> None:
    args = on_gpu(batch.but(dtype=BF16).build())
    call = chosen(PAGED_ATTENTION, args)
    call(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args)
    other = on_gpu(batch.but(lengths=batch.lengths[::-1], queries=batch.queries[::-1], dtype=BF16).build(seed=1))
    other[5].clamp_(max=args[1].shape[0] - 1)
    for mine, new in zip(args, other, strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(new)
    graph.replay()
    assert torch.equal(out, call(*args))
