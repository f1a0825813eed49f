"""What a call would launch on a GPU that is not there: its Triton kernels, compiled as a launch compiles them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its text, and what ptxas says that it needs."""

    name: str
    ptx: str
    shared_bytes: int
    registers: int
    spill_bytes: int
    num_warps: int


class _Driver:
    """Stands in for the driver of a GPU of compute capability `capability` (80, 90)."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _recording(capability: int) -> Iterator[list[Any]]:
    """Launches compile and are noted, not made."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[Any] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launches.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    active = driver._active  # `driver.active` would look for a GPU
    driver.set_active(_Driver(capability))
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = active


def _ptxas(ptx: str) -> str:
    """What the assembler reports of the kernel in `ptx`."""
    from triton import knobs

    match = re.search(r"\.target (sm_\w+)", ptx)
    assert match is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={match[1]}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _number(pattern: str, text: str) -> int:
    return sum(int(found) for found in re.findall(pattern, text))


def compiled(capability: int, call: Callable[..., Any], *args: Any) -> list[Kernel]:
    """The kernels that `call(*args)` launches, compiled for `capability`; its results mean nothing."""
    with _recording(capability) as launches:
        call(*args)
    kernels = []
    for launch in launches:
        said = _ptxas(launch.asm["ptx"])
        kernels.append(
            Kernel(
                launch.metadata.name,
                launch.asm["ptx"],
                launch.metadata.shared,
                _number(r"Used (\d+) registers", said),
                _number(r"(\d+) bytes spill stores", said),
                launch.metadata.num_warps,
            )
        )
    return kernels


# What a block may have on the smallest device from 8.0 on (8.6, 8.9, 12.0); on 9.0, half of a multiprocessor.
MAX_SHARED_BYTES = {80: 99 * 1024, 90: 112 * 1024}


def assert_fits(
    kernel: Kernel, capability: int, spill_bytes: int, shared_bytes: Mapping[int, int] = MAX_SHARED_BYTES
) -> None:
    """Compiled for that capability, in the shared memory of a block, with no more spilled than said."""
    assert f".target sm_{'90a' if capability == 90 else capability}" in kernel.ptx
    assert kernel.shared_bytes <= shared_bytes[capability], (
        f"{kernel.name}: {kernel.shared_bytes} bytes of shared memory"
    )
    assert kernel.spill_bytes <= spill_bytes, f"{kernel.name}: {kernel.spill_bytes} bytes spilled"


def wide_copies(kernel: Kernel) -> int:
    """Asynchronous copies of 16 bytes to shared memory: how tiles of keys, values and weights arrive."""
    return len(re.findall(r"cp\.async\.cg\.shared\.global [^;]*, 0x10", kernel.ptx))
