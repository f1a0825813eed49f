"""A GPU that is not there: tensors with shapes, strides and a CUDA device but no data, for Dynamo and the backend.

A graph for a GPU can so be captured, raised and lowered, and the lowered function be run up to the launches, on any
machine. What reads a number back, or mixes devices, raises on the way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda:0")
CUDA = 1  # c10::DeviceType::CUDA


def allow_cuda_views() -> str | None:
    """Let tensors that claim to be on CUDA be indexed in a torch built without it; None, or why that cannot be.

    Indexing asks for the guard of the tensor's device. FakeTensorMode provides one that does nothing where torch was
    built with CUDA and finds no GPU. Where it was built without, the place of the guard is empty: the CPU's, which does
    nothing either, is put there, for as long as the process lives.
    """
    if torch.version.cuda is not None:
        return None
    path = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        guards = (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(str(path)), "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError) as error:
        return f"torch {torch.__version__} without CUDA: {error}"
    if guards[CUDA] is None:
        guards[CUDA] = guards[0]
    return None


class FakeGpu:
    """Makes fake CUDA tensors, all of one mode: those of one test. `with gpu.mode` new tensors are fake, too.

    `launched` names the Triton kernels started on it, in order, and inside of `with Launches(gpu)` what torch would
    start; `grids` are those of the Triton kernels.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.launched: list[str] = []
        self.grids: list[tuple[int, ...]] = []

    def tensor(self, t: Tensor) -> Tensor:
        """A tensor on the GPU with the shape, strides and dtype of `t`."""
        meta = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        return FakeTensor(self.mode, meta, DEVICE)

    def move(self, module: nn.Module) -> nn.Module:
        """Put a module's parameters and buffers on the GPU, in place."""
        for m in module.modules():
            for name, p in m._parameters.items():
                m._parameters[name] = None if p is None else nn.Parameter(self.tensor(p), requires_grad=False)
            for name, b in m._buffers.items():
                m._buffers[name] = None if b is None else self.tensor(b)
        return module


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeGpu]:
    """A GPU of that compute capability on which kernels do nothing. Needs Triton to be installed."""
    from qwenopt import eligibility
    from qwenopt.ops import gpu

    properties = SimpleNamespace(multi_processor_count=132, major=capability[0], minor=capability[1])
    fake = FakeGpu()
    with (
        mock.patch.object(eligibility, "_PLAIN", (*eligibility._PLAIN, FakeTensor)),
        mock.patch.object(gpu, "find_capability", return_value=capability),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "device_of", return_value=nullcontext()),
        _noting(fake),
        torch.no_grad(),
    ):
        yield fake


class Launches(TorchDispatchMode):
    """Notes torch's own operations, among the Triton kernels: one for each that computes something on the GPU.

    Views and new memory start no kernel.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.launched = gpu.launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # asks a tensor for its device
            return result
        on_gpu = any(isinstance(t, Tensor) and t.device.type == "cuda" for t in tree_leaves((args, kwargs, result)))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if on_gpu and not is_view and not func.__name__.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            self.launched.append(func.__name__)
        return result


class HostReads(TorchDispatchMode):
    """Notes every operation that takes data from the GPU to the host or back: none may be in a CUDA graph.

    A number on the host that a kernel is started with is no copy. What reads a number back raises in the fake mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            given = [t for t in given if t.dim()]
        devices = {t.device.type for t in (*given, *made)}
        if len(devices) > 1:
            self.found.append(str(func))
        return result


def _noting(gpu: FakeGpu) -> Any:
    """Every launch of a Triton kernel notes its name and its grid instead."""
    from triton.runtime.jit import JITFunction

    def note(self: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        gpu.launched.append(self.fn.__name__)
        gpu.grids.append(grid)

    return mock.patch.object(JITFunction, "run", note)
