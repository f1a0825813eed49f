"""The providers `cuda` and `cupy`: when they are there, what they say when not; both start the same kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt import native
from qwenopt.ops import OPS
from qwenopt.ops.cuda import (
    budget_step,
    kv_append,
    linear,
    linear_argmax,
    paged_attention,
    providers,
    qk_norm_rope,
)
from qwenopt.ops.cuda.launch import Launch
from qwenopt.testing import nvcc
from qwenopt.testing.cases import cases

KERNELS: dict[str, Any] = {
    "budget_guard": budget_step.accepts_guard,
    "budget_step": budget_step.accepts_step,
    "kv_append": kv_append.accepts,
    "linear": linear.accepts,
    "linear_argmax": linear_argmax.accepts,
    "paged_attention": paged_attention.accepts,
    "qk_norm_rope": qk_norm_rope.accepts,
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine as torch would describe it."""
    about = SimpleNamespace(there=True, capability=(9, 0), missing=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: about.there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: about.capability)
    monkeypatch.setattr(native, "why_not", lambda: None)
    monkeypatch.setattr(native, "C", lambda: SimpleNamespace(cuda_missing=lambda: about.missing))
    return about


def test_why_a_machine_cannot_run_them(gpu: SimpleNamespace) -> None:
    assert providers.cuda_available() is None
    gpu.missing = "the driver is for CUDA 12.4, the kernels of qwenopt._C were built by nvcc 13.0"
    assert providers.cuda_available() == gpu.missing
    gpu.capability = (7, 5)
    for available in (providers.cuda_available, providers.cupy_available):
        assert available() == "compute capability 7.5; the kernels need 8.0 or newer"
    gpu.there = False
    for available in (providers.cuda_available, providers.cupy_available):
        assert str(available()).startswith("no CUDA device; torch.cuda.is_available() is False")


@pytest.mark.parametrize("name", KERNELS)
def test_cuda_stands_before_cupy(name: str) -> None:
    names = [p.name for p in OPS[name].providers if p.device == "cuda"]
    assert names.index("cuda") + 1 == names.index("cupy")


@pytest.mark.parametrize("name", [name for name in KERNELS if cases(name)])
def test_a_meta_tensor_is_enough_to_choose(name: str) -> None:
    """`accepts` looks at shapes and strides, never at data."""
    accepts = KERNELS[name]
    for case in cases(name):
        args = case.build(torch.bfloat16)
        moved = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
        assert accepts(*moved) == accepts(*args)


def test_tensors_on_several_devices_are_refused() -> None:
    x, weight = torch.randn(1, 8), torch.randn(4, 8, device="meta")
    (cuda,) = (p for p in OPS["linear"].providers if p.name == "cuda")
    assert cuda.accepts(x, weight, None) == "tensors on several devices: x on cpu, weight on meta"


def test_both_start_the_same_kernel(monkeypatch: pytest.MonkeyPatch, gpu: SimpleNamespace) -> None:
    from qwenopt.cupy_kernels import launch as cupy_launch

    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
    lib = SimpleNamespace(cuda_launch=lambda *args: seen.append(args))
    monkeypatch.setattr(native, "C", lambda: lib)
    monkeypatch.setattr(cupy_launch, "start", lambda *args: seen.append(args[:6]))
    launch = Launch("budget_step", (5, 1, 1), 32, bytes(80))
    providers.run_cuda(launch)
    providers.run_cupy(launch)
    assert seen[0] == seen[1] == ("budget_step", (5, 1, 1), 32, bytes(80), 1, 77)


@pytest.mark.skipif(not native.available() or torch.cuda.is_available(), reason="needs a native module, and no GPU")
def test_without_a_driver_a_launch_says_so() -> None:
    lib = native.C()
    if nvcc.nvcc() is None and not lib.cuda_kernels():
        pytest.skip("qwenopt._C was built without CUDA, since nvcc is not there")
    with pytest.raises(ValueError, match=r"cuda: (no CUDA driver \(libcuda\.so\.1\)|the CUDA driver)"):
        lib.cuda_launch("budget_step", (1, 1, 1), 32, bytes(80), 0, 0)
