"""Which graphs on a GPU are rewritten, why others are not, and what serves them: decided on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qwenopt import backend
from qwenopt.eligibility import device_of, why_not
from qwenopt.ops import ATTENTION, LINEAR, gpu
from qwenopt.ops.triton import attention as by_triton
from qwenopt.options import Options
from qwenopt.report import GraphReport
from qwenopt.testing.fake_cuda import FakeGpu, fake_gpu

GRAPH = torch.fx.symbolic_trace(lambda x: x)


@pytest.fixture
def fake() -> Iterator[FakeGpu]:
    with fake_gpu() as made:
        yield made


def on(fake: FakeGpu, device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return FakeTensor(fake.mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device(device))


def test_one_gpu_is_eligible_with_numbers_on_the_host(fake: FakeGpu) -> None:
    inputs = [torch.tensor(3), on(fake, "cuda:1", 2, 3), 7]
    assert why_not(GRAPH, inputs) is None
    assert device_of(inputs) == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        (("cuda:1", "cuda:0"), "tensors on several devices: cuda:0, cuda:1; a graph is rewritten where one device"),
        (("cuda:0", "cpu"), r"tensors on several devices: cuda:0, cpu \(1 tensors\)"),
        (("xpu:0",), "graphs on xpu are not rewritten in this version"),
    ],
)
def test_other_places_are_named(fake: FakeGpu, devices: Sequence[str], why: str) -> None:
    inputs = [torch.ones(2) if d == "cpu" else on(fake, d, 2) for d in devices]
    with pytest.raises(AssertionError, match=why):
        assert why_not(GRAPH, inputs) is None, why_not(GRAPH, inputs)


def test_old_gpus_are_refused() -> None:
    with fake_gpu((7, 5)) as fake:
        assert why_not(GRAPH, [on(fake, "cuda:0", 2)]) == "compute capability 7.5; the kernels need 8.0 or newer"


def test_autocast_of_the_gpu_is_seen(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert why_not(GRAPH, [on(fake, "cuda:0", 2)]) == "autocast is on"
    assert why_not(GRAPH, [torch.ones(2)]) is None


@pytest.mark.parametrize(
    ("built", "error", "why"),
    [
        (None, "", "this torch was built without CUDA"),
        ("13.0", "Found no NVIDIA driver on your system. Please check that", "Found no NVIDIA driver on your system"),
        ("13.0", "The NVIDIA driver on your system is too old (found version 12040). Please", "too old (found version"),
    ],
)
def test_a_missing_gpu_is_explained(built: str | None, error: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = str(gpu.no_device())
    assert reason.startswith("no CUDA device; torch.cuda.is_available() is False: ")
    assert why in reason
    assert "Please" not in reason


@pytest.mark.parametrize(
    ("device", "options", "lowering"),
    [
        ("cuda:0", {}, "direct"),
        ("cuda:0", {"mode": "reduce-overhead"}, "direct"),
        ("cuda:0", {"mode": "max-autotune"}, "inductor"),
        ("cpu", {"mode": "reduce-overhead"}, "inductor"),
    ],
)
def test_the_mode_that_a_gpu_serves_itself(device: str, options: dict[str, Any], lowering: str) -> None:
    from qwenopt.graphs import Context

    gm = torch.fx.symbolic_trace(lambda x: x)
    given = Options.parse(None, options)
    found, _ = backend._choose_lowering(gm, Context(gm), given, GraphReport(0), torch.device(device))
    assert found == lowering


def test_torch_itself_serves_what_triton_does_not(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(op: Any, *args: Any) -> str | None:
        provider = op.choose(args).provider
        return None if provider is None else provider.name

    x, weight = (on(fake, "cuda:0", *shape, dtype=torch.float64) for shape in ((4, 8), (6, 8)))
    q, few = (on(fake, "cuda:0", 1, heads, 40, 64) for heads in (34, 32))
    k = on(fake, "cuda:0", 1, 2, 40, 64)
    positions = on(fake, "cuda:0", 40, dtype=torch.int64)
    assert chosen(LINEAR, x, weight, None) == "torch"
    assert chosen(LINEAR, x.bfloat16(), weight.bfloat16(), None) == "triton"
    assert chosen(ATTENTION, q, k, k, None, None, True, 0.125) == "torch", "17 query heads for each of two"
    assert chosen(ATTENTION, few, k, k, None, None, True, 0.125) == "triton"
    assert chosen(ATTENTION, q, k, k, None, positions, False, 0.125) is None
    monkeypatch.setattr("qwenopt.ops.triton._installed", lambda: False)
    assert chosen(LINEAR, x.bfloat16(), weight.bfloat16(), None) in ("cuda", "cupy", "torch")


def test_a_whole_prompt_goes_to_flash_attention() -> None:
    """By the wrapper of the Triton kernel, on sizes alone; the result is the reference's."""
    q, k, v = (torch.randn(1, heads, 40, 16).bfloat16() for heads in (4, 2, 2))
    args = (q, k, v, None, None, True, 0.25)
    found = by_triton.attention(*args)
    wanted = ATTENTION.reference(*args)
    assert found.stride() == wanted.stride()
    assert torch.equal(found, wanted)
    for other in ((q, k, v, None, torch.arange(40), False, 0.25), (q[:, :, :30], k, v, None, None, True, 0.25)):
        assert not by_triton._is_torchs(other[0], other[1], other[3], other[4], other[5])
