"""Kernels compiled by NVRTC, loaded and started through CuPy."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

from qwenopt.cupy_kernels import nvrtc, sources


class _Stream(NamedTuple):
    """Somebody else's stream: CuPy asks the stream that a kernel is started on for its handle, and for nothing else."""

    ptr: int


@functools.cache
def why_not(capability: tuple[int, int], cuda_major: int | None) -> str | None:
    """Why kernels cannot be compiled for and started on such a device; None when they can."""
    if importlib.util.find_spec("cupy") is None:
        return f"cupy is not installed (pip install cupy-cuda{cuda_major or nvrtc.MAJORS[0]}x)"
    try:
        import cupy

        if not cupy.cuda.is_available():
            return "cupy finds no CUDA device (cupy.cuda.is_available() is False)"
        nvrtc.architecture(capability, _compiler(cuda_major))
    except nvrtc.NvrtcError as error:
        return str(error)
    except Exception as error:  # a CuPy for another CUDA fails in many ways: all of them mean "cannot be used"
        return f"cupy cannot be used: {type(error).__name__}: {error}"
    return None


@functools.cache
def _compiler(cuda_major: int | None) -> nvrtc.Nvrtc:
    return nvrtc.load(cuda_major)


@functools.cache
def _module(file: str, device: int, capability: tuple[int, int], cuda_major: int | None) -> Any:
    import cupy

    compiler = _compiler(cuda_major)
    made = sources.cubin(file, nvrtc.architecture(capability, compiler), compiler)
    module = cupy.cuda.Module()
    with cupy.cuda.Device(device):
        module.load(made)
    return module


@functools.cache
def _function(kernel: str, device: int, capability: tuple[int, int], cuda_major: int | None) -> Any:
    return _module(sources.file_of(kernel), device, capability, cuda_major).get_function(kernel)


def start(
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    args: bytes,
    device: int,
    stream: int,
    capability: tuple[int, int],
    cuda_major: int | None,
) -> None:
    """Start a kernel; `args` is its argument struct. Raises NvrtcError, or what CuPy raises of the driver."""
    import cupy
    import numpy as np

    function = _function(kernel, device, capability, cuda_major)
    struct = np.frombuffer(args, dtype=f"V{len(args)}")  # of one element: passed by value
    with cupy.cuda.Device(device):
        function(grid, (threads, 1, 1), (struct,), stream=_Stream(stream))
