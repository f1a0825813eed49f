"""The small Triton kernels on a GPU, as `Op.choose` picks them: what the references give on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import BUDGET_GUARD, BUDGET_STEP, OPS, RMS_NORM
from qwenopt.testing.budget_rows import random_rows
from qwenopt.testing.cases import CASES, Case
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.results import results
from qwenopt.testing.tolerance import assert_as_accurate, error, ulp

pytestmark = pytest.mark.gpu

SMALL = ("rms_norm", "add_rms_norm", "silu_mul", "qk_norm_rope", "moe_route")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def on_gpu(args: Any) -> list[Any]:
    return [a.cuda() if isinstance(a, Tensor) else a for a in args]


def cpu(args: Any) -> list[Any]:
    return [a.cpu() if isinstance(a, Tensor) else a for a in args]


def chosen(op: Any, args: Any) -> Any:
    choice = op.choose(args)
    assert choice.provider is not None, choice.reason
    assert choice.provider.name == "triton"
    return choice.provider.overload


@pytest.mark.parametrize("seed", range(10))
def test_budget_step(seed: int) -> None:
    args = random_rows(seed)
    moved = on_gpu(args)
    out = chosen(BUDGET_STEP, moved)(*moved)
    assert torch.equal(out.cpu(), BUDGET_STEP.reference(*args))
    for found, wanted in zip(moved, args, strict=True):
        assert torch.equal(found.cpu(), wanted)


def test_budget_step_in_a_cuda_graph() -> None:
    """Each replay takes the state on from where it is, with no host in between."""
    args = random_rows(0)
    moved = on_gpu(args)
    call = chosen(BUDGET_STEP, moved)
    call(*on_gpu(args))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*moved)
    for seed in range(5):
        sampled, signals = random_rows(seed)[:2]
        moved[0].copy_(sampled)
        moved[1].copy_(signals)
        graph.replay()
        assert torch.equal(out.cpu(), BUDGET_STEP.reference(sampled, signals, *args[2:]))
    assert torch.equal(moved[2].cpu(), args[2])


@DTYPES
@pytest.mark.parametrize("seed", range(4))
def test_budget_guard(seed: int, dtype: torch.dtype) -> None:
    _, _, state, _, _, ids = random_rows(seed)
    logits = torch.randn(len(state), 60).to(dtype)
    moved = on_gpu((logits, state, ids))
    chosen(BUDGET_GUARD, (moved[0][:, :50], *moved[1:]))(moved[0][:, :50], *moved[1:])
    BUDGET_GUARD.reference(logits[:, :50], state, ids)
    assert torch.equal(moved[0].cpu(), logits)


@DTYPES
@pytest.mark.parametrize("case", [c for c in CASES if c.op in SMALL], ids=str)
def test_small_ops(case: Case, dtype: torch.dtype) -> None:
    op, args = OPS[case.op], case.build(dtype)
    moved = on_gpu(args)
    found, eager = results(op, chosen(op, moved), moved), results(op, op.reference, moved)
    truths = FORMULAS[case.op](*args)
    truths = truths if isinstance(truths, tuple) else (truths,)
    for a, e, t in zip(found, eager, truths, strict=True):
        if e.dtype.is_floating_point:
            assert_as_accurate(a.cpu(), e.cpu(), t)
        else:
            assert torch.equal(moved[0].gather(-1, a), moved[0].gather(-1, e))
        assert a.stride() == e.stride() or a.numel() == 0 or 1 in a.shape


@DTYPES
def test_many_rows(dtype: torch.dtype) -> None:
    x, residual = (torch.randn(5000, 1024, device="cuda").to(dtype) for _ in range(2))
    weight = torch.rand(1024, device="cuda").to(dtype)
    q, k = (torch.randn(2, 300, heads, 128, device="cuda").to(dtype) for heads in (32, 4))
    table = torch.randn(1, 300, 128, device="cuda").to(dtype)
    logits = torch.randn(5000, 128, device="cuda").to(dtype)
    for name, args in (
        ("rms_norm", (x, weight, 1e-6)),
        ("add_rms_norm", (x, residual, weight, 1e-6)),
        ("silu_mul", (x, residual)),
        ("qk_norm_rope", (q, k, weight[:128], weight[:128], table, table, 1e-6)),
        ("moe_route", (logits, 8, True)),
    ):
        op = OPS[name]
        found, eager = results(op, chosen(op, args), args)[0], results(op, op.reference, args)[0]
        truth = FORMULAS[name](*(a.cpu() if isinstance(a, Tensor) else a for a in args))
        assert_as_accurate(found.cpu(), eager.cpu(), truth[0] if isinstance(truth, tuple) else truth)


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_an_append_with_its_rotation(tokens: int, dtype: torch.dtype, coded: bool) -> None:
    """As accurate as eager; codes no further from the truth than half a step more, values as they come."""
    q, k, v = torch.randn(1, tokens, 48, 128, device="cuda").to(dtype).split([32, 8, 8], 2)
    weight, table = torch.rand(128, device="cuda").to(dtype), torch.randn(1, tokens, 128, device="cuda").to(dtype)
    shape = (tokens // 16 + 2, 8, 16, 128)
    pools = [torch.zeros(shape, dtype=torch.int8 if coded else dtype, device="cuda") for _ in range(2)]
    scales = [torch.zeros(shape[:3], device="cuda") if coded else None for _ in range(2)]
    rope = (q, k, weight, weight, table, table, 1e-6)
    slots = torch.randperm(shape[0] * 16, device="cuda")[:tokens]
    rest = (*pools, *scales, v.transpose(1, 2), slots)
    found = chosen(OPS["qk_norm_rope_append"], (*rope, *rest))(*rope, *rest)
    eager, truth = OPS["qk_norm_rope"].reference(*rope), FORMULAS["qk_norm_rope"](*cpu(rope))
    assert_as_accurate(found.cpu(), eager[0].cpu(), truth[0])
    at = (slots // 16, slice(None), slots % 16)
    keys, values = (pool[at].transpose(0, 1)[None].cpu() for pool in pools)  # [1, G, T, D], as they were given
    if not coded:
        assert_as_accurate(keys, eager[1].cpu(), truth[1])
        assert torch.equal(values, v.transpose(1, 2).cpu())
        return
    key_steps, value_steps = (scale[at].t()[None, :, :, None].double().cpu() for scale in scales if scale is not None)
    rounding = 127 * 2**-22  # of the factor, the product and the scale, in float32, in steps
    allowed = 2 * error(eager[1].cpu(), truth[1]) + ulp(truth[1], dtype)
    assert ((keys * key_steps - truth[1]).abs() <= (0.5 + rounding) * key_steps + allowed).all()
    assert ((values * value_steps - v.transpose(1, 2).double().cpu()).abs() <= (0.5 + rounding) * value_steps).all()


@pytest.mark.parametrize("tokens", [1, 300])
def test_a_static_append_with_its_rotation(tokens: int) -> None:
    q, k, v = torch.randn(2, tokens, 48, 128, device="cuda").bfloat16().split([32, 8, 8], 2)
    weight, table = torch.rand(128, device="cuda").bfloat16(), torch.randn(1, tokens, 128, device="cuda").bfloat16()
    rope, length = (q, k, weight, weight, table, table, 1e-6), torch.tensor(20, device="cuda")
    keys, values = (torch.zeros(2, 8, 400, 128, device="cuda").bfloat16() for _ in range(2))
    args = (*rope, keys, values, v.transpose(1, 2), length)
    found = chosen(OPS["qk_norm_rope_static_append"], args)(*args)
    eager, truth = OPS["qk_norm_rope"].reference(*rope), FORMULAS["qk_norm_rope"](*cpu(rope))
    assert_as_accurate(found.cpu(), eager[0].cpu(), truth[0])
    assert_as_accurate(keys[:, :, 20 : 20 + tokens].cpu(), eager[1].cpu(), truth[1])
    assert torch.equal(values[:, :, 20 : 20 + tokens], v.transpose(1, 2))
    for cache in (keys, values):
        assert not cache[:, :, :20].any()
        assert not cache[:, :, 20 + tokens :].any()


def test_a_norm_in_a_cuda_graph() -> None:
    x, weight = torch.randn(3, 1024, device="cuda"), torch.rand(1024, device="cuda")
    call = chosen(RMS_NORM, (x, weight, 1e-6))
    call(x, weight, 1e-6)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, weight, 1e-6)
    x.normal_()
    graph.replay()
    assert torch.equal(out, call(x, weight, 1e-6))
