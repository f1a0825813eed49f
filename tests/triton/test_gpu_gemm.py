"""linear and moe_experts by Triton on a GPU, as `Op.choose` picks them: against float64, eager, in a CUDA graph."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import LINEAR, LINEAR_ARGMAX, LINEAR_GROUP, LINEAR_SILU_MUL, MOE_EXPERTS
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.tolerance import assert_as_accurate

pytestmark = pytest.mark.gpu

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [FP32, HALF, BF16], ids=str)


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def check(op: Any, args: tuple[Any, ...]) -> Tensor:
    """What the Triton provider gives, no further from float64 than eager, the same bits each time."""
    args = on_gpu(args)
    choice = op.choose(args)
    assert choice.provider is not None, choice.reason
    assert choice.provider.name == "triton"
    found = choice.provider.overload(*args)
    assert_as_accurate(found.cpu(), op.reference(*args).cpu(), op.reference(*in_float64(args)).cpu())
    assert torch.equal(found, choice.provider.overload(*args)), "the same arguments give the same bits"
    return found


def replays(op: Any, args: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """A CUDA graph of a call computes what a call computes, on other numbers."""
    args = on_gpu(args)
    call = op.choose(args).provider.overload
    call(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args)
    for mine, new in zip(args, other, strict=True):
        if isinstance(mine, Tensor):
            mine.copy_(new)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, call(*args))


def rows_and_weight(rows: int, n: int, k: int, dtype: torch.dtype, bias: bool = False) -> tuple[Any, ...]:
    x, weight = torch.randn(rows, k), torch.randn(n, k) * k**-0.5
    return tuple(None if t is None else t.to(dtype) for t in (x, weight, torch.randn(n) if bias else None))


@DTYPES
@pytest.mark.parametrize("case", cases("linear"), ids=str)
def test_linear_cases(case: Case, dtype: torch.dtype) -> None:
    check(LINEAR, case.build(dtype))


@DTYPES
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (4096, 4096), (1024, 3072), (151936, 1024), (2560, 9728)])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17])
def test_linear(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(LINEAR, rows_and_weight(rows, n, k, dtype, bias=k == 3072))


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_linear_argmax(rows: int, dtype: torch.dtype) -> None:
    """The choice from what `linear` writes on this device, bit for bit."""
    args = on_gpu(rows_and_weight(rows, 151936, 1024, dtype))
    choice = LINEAR_ARGMAX.choose(args)
    assert choice.provider is not None, choice.reason
    assert choice.provider.name == "triton"
    wanted = LINEAR(*args).sort(dim=-1, descending=True, stable=True)[1][:, :1]
    for _ in range(3):
        assert torch.equal(choice.provider.overload(*args), wanted)


@DTYPES
@pytest.mark.parametrize("case", cases("linear_silu_mul"), ids=str)
def test_linear_silu_mul_cases(case: Case, dtype: torch.dtype) -> None:
    check(LINEAR_SILU_MUL, case.build(dtype))


@DTYPES
@pytest.mark.parametrize(("n", "k"), [(3072, 1024), (12288, 4096), (9728, 2560)])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17])
def test_linear_silu_mul(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, gate, _ = rows_and_weight(rows, n, k, dtype)
    check(LINEAR_SILU_MUL, (x, gate, rows_and_weight(1, n, k, dtype)[1]))


@DTYPES
@pytest.mark.parametrize(("columns", "k"), [((2048, 1024, 1024), 1024), ((4096, 1024, 1024), 4096), ((512, 512), 2048)])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17])
def test_linear_group(rows: int, columns: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, k).to(dtype).cuda()
    weights = [(torch.randn(n, k) * k**-0.5).to(dtype).cuda() for n in columns]
    choice = LINEAR_GROUP.choose((x, weights))
    assert choice.provider is not None, choice.reason
    found, again = choice.provider.overload(x, weights), choice.provider.overload(x, weights)
    for one, same, weight in zip(found, again, weights, strict=True):
        assert torch.equal(one, same), "the same arguments give the same bits"
        truth = x.double() @ weight.double().t()
        assert_as_accurate(one.cpu(), LINEAR.reference(x, weight, None).cpu(), truth.cpu())


@pytest.mark.parametrize("rows", [1, 4])
def test_linear_in_a_cuda_graph(rows: int) -> None:
    replays(LINEAR, rows_and_weight(rows, 1024, 1024, BF16), rows_and_weight(rows, 1024, 1024, BF16))


def experts(
    tokens: int, dtype: torch.dtype, num_experts: int = 128, top_k: int = 8, hidden: int = 512, inter: int = 384
) -> tuple[Any, ...]:
    indices = torch.rand(tokens, num_experts).argsort(-1)[:, :top_k].contiguous()
    indices[torch.rand(indices.shape) < 0.05] = num_experts  # another rank's
    gate_up = torch.randn(num_experts, 2 * inter, hidden) * hidden**-0.5
    down = torch.randn(num_experts, hidden, inter) * inter**-0.5
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    return x.to(dtype), indices, weights.to(dtype), gate_up.to(dtype), down.to(dtype)


@DTYPES
@pytest.mark.parametrize("case", cases("moe_experts"), ids=str)
def test_expert_cases(case: Case, dtype: torch.dtype) -> None:
    check(MOE_EXPERTS, case.build(dtype))


@DTYPES
@pytest.mark.parametrize("tokens", [1, 4, 8, 9, 64, 256, 1024, 2500])
def test_experts(tokens: int, dtype: torch.dtype) -> None:
    check(MOE_EXPERTS, experts(tokens, dtype))


@pytest.mark.parametrize("tokens", [2, 512])
def test_experts_of_full_size(tokens: int) -> None:
    check(MOE_EXPERTS, experts(tokens, BF16, hidden=2048, inter=768))


def test_all_tokens_in_one_expert() -> None:
    x, indices, *rest = experts(700, BF16, top_k=1)
    check(MOE_EXPERTS, (x, torch.full_like(indices, 127), *rest))


@pytest.mark.parametrize("tokens", [4, 100, 2500])
def test_experts_in_a_cuda_graph(tokens: int) -> None:
    replays(MOE_EXPERTS, experts(tokens, BF16), experts(tokens, BF16))


WRONG_ID = """
import torch
from qwenopt.ops import MOE_EXPERTS
ids = torch.zeros({tokens}, 2, dtype=torch.long, device="cuda")
ids[-1, 1] = 9
x, scores, gate_up, down = (torch.ones(s, device="cuda") for s in (({tokens}, 64), ids.shape, (8, 64, 64), (8, 64, 32)))
MOE_EXPERTS(x, ids, scores, gate_up, down)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tokens", [1, 50])
def test_a_wrong_id_stops_the_device(tokens: int) -> None:
    """In a process of its own: the device is lost to it afterwards."""
    done = subprocess.run([sys.executable, "-P", "-c", WRONG_ID.format(tokens=tokens)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "an expert id is not in 0..num_experts" in done.stdout + done.stderr
