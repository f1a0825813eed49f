"""Every CUDA kernel on a GPU, by `qwenopt._C` and by NVRTC and CuPy: against float64, eager, the reference's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import BUDGET_GUARD, BUDGET_STEP, KV_APPEND, LINEAR, LINEAR_ARGMAX, PAGED_ATTENTION, QK_NORM_ROPE
from qwenopt.ops.budget_state import Column
from qwenopt.ops.cuda import linear, moe_align, providers, qk_norm_rope
from qwenopt.ops.cuda.launch import Run
from qwenopt.testing.budget_rows import ROWS, VOCAB, random_rows
from qwenopt.testing.cases import case, cases
from qwenopt.testing.ragged import Ragged
from qwenopt.testing.tolerance import assert_as_accurate

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
DECODE = Ragged((37, 5, 1300, 1, 640), (1, 1, 1, 1, 1), heads=32, kv_heads=4, head_dim=128, dtype=BF16)
BATCHES = {
    "decode": DECODE,
    **{f"groups {h}/{g}": DECODE.but(heads=h, kv_heads=g) for h, g in ((16, 8), (40, 8), (64, 8), (64, 4))},
    "head_dim 64": DECODE.but(head_dim=64),
    "long": DECODE.but(lengths=(9000,), queries=(1,)),
    "pages of 64": DECODE.but(page_size=64),
    "window": DECODE.but(window=100),
    "int8": DECODE.but(int8=True, page_size=64),
    "int8, head_dim 64": DECODE.but(int8=True, head_dim=64),
    "several queries": DECODE.but(queries=(3, 1, 2, 1, 4), padding=2),
    "batch": Ragged((600, 600), (1, 1), heads=16, kv_heads=8, head_dim=128, dtype=BF16, packed=False),
}


@pytest.fixture(params=["cuda", "cupy"])
def name(request: pytest.FixtureRequest) -> str:
    available, _ = providers.RUNS[request.param]
    reason = available()
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def run(name: str) -> Run:
    return providers.RUNS[name][1]


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


def overload(op: Any, name: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    (provider,) = (p for p in op.providers if p.name == name)
    assert provider.accepts(*args) is None
    return provider.overload  # type: ignore[no-any-return]


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


SHAPES = [(1, 1024, 3072), (5, 2048, 1000), (16, 1200, 4096), (1, 37, 19), (3, 37, 19), (9, 37, 19)]


@DTYPES
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(name: str, shape: tuple[int, int, int], biased: bool, dtype: torch.dtype) -> None:
    m, k, n = shape
    x, weight, bias = torch.randn(m, k), torch.randn(n, k) * k**-0.5, torch.randn(n)
    args = on_gpu((x.to(dtype), weight.to(dtype), bias.to(dtype) if biased else None))
    found = overload(LINEAR, name, args)(*args)
    assert_as_accurate(found.cpu(), LINEAR.reference(*args).cpu(), LINEAR.reference(*in_float64(args)).cpu())
    assert torch.equal(found, overload(LINEAR, name, args)(*args)), "the same arguments give the same bits"


def first_of_the_largest(logits: Tensor) -> Tensor:
    return (logits == logits.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1, keepdim=True)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_linear_argmax(run: Run, name: str, rows: int, biased: bool) -> None:
    x, weight, bias = torch.randn(rows, 1024), torch.randn(151936, 1024), 9 * torch.randn(151936)
    args = on_gpu((x.to(BF16), weight.to(BF16), bias.to(BF16) if biased else None))
    call = overload(LINEAR_ARGMAX, name, args)
    for _ in range(3):
        assert torch.equal(call(*args), first_of_the_largest(linear.linear(run, *args)))


def test_linear_argmax_in_a_cuda_graph(run: Run, name: str) -> None:
    x, weight = on_gpu((torch.randn(8, 1024).to(BF16), torch.randn(151936, 1024).to(BF16)))
    call = overload(LINEAR_ARGMAX, name, (x, weight, None))
    call(x, weight, None)  # loads, or compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = call(x, weight, None)
    for _ in range(3):  # what blocks count in begins at zero each time
        x.normal_()
        graph.replay()
        assert torch.equal(ids, first_of_the_largest(linear.linear(run, x, weight, None)))


@DTYPES
@pytest.mark.parametrize("one", cases("qk_norm_rope"), ids=str)
def test_qk_norm_rope(name: str, one: Any, dtype: torch.dtype) -> None:
    args = on_gpu(one.build(dtype))
    found, eager = overload(QK_NORM_ROPE, name, args)(*args), QK_NORM_ROPE.reference(*args)
    for a, b, c in zip(found, eager, QK_NORM_ROPE.reference(*in_float64(args)), strict=True):
        assert_as_accurate(a.cpu(), b.cpu(), c.cpu())


@DTYPES
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
def test_qk_norm_rope_append(run: Run, name: str, coded: bool, dtype: torch.dtype) -> None:
    rope = on_gpu(case("qk_norm_rope", "prefill").build(dtype))
    shape = (4, rope[1].shape[2], 16, rope[1].shape[3])
    pools = [torch.zeros(shape, dtype=torch.int8 if coded else dtype, device="cuda") for _ in range(2)]
    scales = [torch.zeros(shape[:3], device="cuda") if coded else None for _ in range(2)]
    same = [None if t is None else t.clone() for t in (*pools, *scales)]
    v = torch.randn_like(rope[1]).transpose(1, 2)
    slots = torch.randperm(64, device="cuda")[: rope[1].shape[0] * rope[1].shape[1]]
    q = qk_norm_rope.qk_norm_rope_append(run, *rope, *pools, *scales, v, slots)
    apart = overload(QK_NORM_ROPE, name, rope)(*rope)
    overload(KV_APPEND, name, (*same, apart[1], v, slots))(*same, apart[1], v, slots)
    assert torch.equal(q, apart[0])
    for a, b in zip((*pools, *scales), same, strict=True):
        assert a is b is None or torch.equal(a, b)


@DTYPES
@pytest.mark.parametrize("pool", [torch.float32, BF16, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_kv_append(name: str, tokens: int, pool: torch.dtype, dtype: torch.dtype) -> None:
    shape = (70, 8, 16, 128)
    pools = [torch.zeros(shape, dtype=pool) for _ in range(2)]
    scales = [torch.zeros(shape[:3]) if pool == torch.int8 else None for _ in range(2)]
    k, v = (torch.randn(1, tokens, 8, 128).to(dtype).transpose(1, 2) for _ in range(2))
    slots = torch.randperm(70 * 16)[:tokens]
    slots[tokens // 2] = -1
    args = (*pools, *scales, k, v, slots)
    moved = on_gpu(args)
    overload(KV_APPEND, name, moved)(*moved)
    KV_APPEND.reference(*args)
    for found, wanted in zip(moved, args, strict=True):
        assert wanted is None or torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("batch", BATCHES)
def test_paged_attention(name: str, batch: str) -> None:
    args = on_gpu(BATCHES[batch].build())
    call = overload(PAGED_ATTENTION, name, args)
    found = call(*args)
    q, k, v, *rest = args
    eager = PAGED_ATTENTION.reference(q, k.nan_to_num(), v.nan_to_num(), *rest)
    truth = (t if t.dtype == torch.int8 else t.double().nan_to_num() for t in (k, v))
    assert_as_accurate(found.cpu(), eager.cpu(), PAGED_ATTENTION.reference(q.double(), *truth, *rest).cpu())
    assert torch.equal(found, call(*args)), "the same arguments give the same bits"


def test_a_cuda_graph_serves_other_lengths(name: str) -> None:
    args = on_gpu(DECODE.build())
    call = overload(PAGED_ATTENTION, name, args)
    call(*args)  # loads, or compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args)
    other = on_gpu(DECODE.but(lengths=DECODE.lengths[::-1]).build(seed=1))
    other[5].clamp_(max=args[1].shape[0] - 1)
    for mine, new in zip(args, other, strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(new)
    graph.replay()
    assert torch.equal(out, call(*args))


@pytest.mark.parametrize("seed", range(4))
def test_budget_step(name: str, seed: int) -> None:
    args = tuple(random_rows(seed))
    moved = on_gpu(args)
    found = overload(BUDGET_STEP, name, moved)(*moved)
    assert torch.equal(found.cpu(), BUDGET_STEP.reference(*args))
    assert torch.equal(moved[2].cpu(), args[2])


@DTYPES
@pytest.mark.parametrize("seed", range(4))
def test_budget_guard(name: str, seed: int, dtype: torch.dtype) -> None:
    _, _, state, _, _, ids = random_rows(seed)
    state[:, Column.SINCE] = torch.randint(-1, 4, (ROWS,))
    args = (torch.randn(ROWS, VOCAB).to(dtype), state, ids)
    moved = on_gpu(args)
    overload(BUDGET_GUARD, name, moved)(*moved)
    BUDGET_GUARD.reference(*args)
    assert torch.equal(moved[0].cpu(), args[0])


@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_moe_align(run: Run, tokens: int) -> None:
    indices = torch.rand(tokens, 128).argsort(-1)[:, :8].contiguous()
    found = moe_align.moe_align(run, indices.cuda(), 128, 16)
    order = indices.flatten().sort(stable=True)
    used = found.sorted[: int(found.num_sorted)].cpu()
    assert torch.equal(used[used < indices.numel()].long(), order.indices)
    assert torch.equal(indices.flatten()[order.indices].bincount(minlength=128).add(15).div(16, rounding_mode="floor"),
                       found.offsets.diff().cpu() // 16)  # fmt: skip
