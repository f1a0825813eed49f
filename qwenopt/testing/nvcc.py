"""CUDA files compiled where there is no GPU: by nvcc and by NVRTC, with what ptxas says that each kernel needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Needs:
    """Registers of a thread, bytes that it spills or keeps in memory otherwise, static shared memory of a block."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


# As setup.py and qwenopt.cupy_kernels.sources.OPTIONS have them.
OPTIONS = ("-x", "cu", "-std=c++17", "-fmad=false", "-Werror", "all-warnings")
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_\w+'\n.*\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\n.*Used (\d+) registers[^\n]*"
)


def needs(said: str) -> dict[str, Needs]:
    """What ptxas said, by kernel."""
    found = {}
    for match in _ENTRY.finditer(said):
        shared = re.search(r"(\d+) bytes smem", match[0])
        name, stack, stores, loads, registers = match.groups()
        shared_bytes = int(shared[1]) if shared else 0
        found[name] = Needs(int(registers), int(stack), int(stores) + int(loads), shared_bytes)
    return found


def nvcc() -> str | None:
    """The compiler of a CUDA toolkit, or None."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compiled(source: Path, arch: str, *options: str) -> dict[str, Needs]:
    """The kernels of a .cuh file, compiled to machine code for `arch` (`sm_90a`), by name."""
    command = [str(nvcc()), *OPTIONS, "-cubin", f"-arch={arch}", "-Xptxas", "-v", *options, "-o", "/dev/null"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return needs(done.stderr)
