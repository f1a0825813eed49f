"""The two providers of the CUDA kernels: `cuda`, compiled into `qwenopt._C`, and `cupy`, compiled at the first use.

Both start the same kernels on the same grids. `cuda` is preferred, since nothing is left to compile; `cupy` serves
where the package was built without nvcc.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from qwenopt import native
from qwenopt.ops.cuda.launch import Launch, Run
from qwenopt.ops.gpu import no_device, one_device
from qwenopt.ops.op import Op


def cuda_available() -> str | None:
    """None when the kernels in `qwenopt._C` can run on this machine, else why not."""
    reason = native.why_not() or no_device()
    if reason is None:
        reason = native.C().cuda_missing()
    return reason


def cupy_available() -> str | None:
    """None when CuPy and NVRTC can compile and start the kernels on this machine, else why not."""
    reason = no_device()
    if reason is None:
        from qwenopt.cupy_kernels import launch

        reason = launch.why_not(torch.cuda.get_device_capability(), _cuda_major())
    return reason


def _cuda_major() -> int | None:
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


def run_cuda(launch: Launch) -> None:
    """Start a kernel of `qwenopt._C` on torch's current device and stream."""
    device = torch.cuda.current_device()
    stream = torch.cuda.current_stream(device).cuda_stream
    native.C().cuda_launch(launch.kernel, launch.grid, launch.threads, launch.args, device, stream)


def run_cupy(launch: Launch) -> None:
    """Start a kernel through CuPy on torch's current device and stream; the first use of its file compiles that."""
    from qwenopt.cupy_kernels import launch as cupy_launch

    device = torch.cuda.current_device()
    stream = torch.cuda.current_stream(device).cuda_stream
    capability = torch.cuda.get_device_capability(device)
    cupy_launch.start(
        launch.kernel, launch.grid, launch.threads, launch.args, device, stream, capability, _cuda_major()
    )


RUNS: dict[str, tuple[Callable[[], str | None], Run]] = {
    "cuda": (cuda_available, run_cuda),
    "cupy": (cupy_available, run_cupy),
}


def register(op: Op, accepts: Callable[..., str | None], fn: Callable[..., Any]) -> None:
    """Make `fn(run, *args)` the providers `cuda` and `cupy` of an op."""

    def fits(*args: Any) -> str | None:
        tensors = {name: a for name, a in zip(op.signature.parameters, args, strict=True) if isinstance(a, Tensor)}
        return one_device(**tensors) or accepts(*args)

    for name, (available, run) in RUNS.items():
        op.provider(name, "cuda", available=available, accepts=fits)(_on_device(op, partial(fn, run)))


def _on_device(op: Op, fn: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(op.reference)  # for its signature
    def call(*args: Any) -> Any:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return fn(*args)

    return call
