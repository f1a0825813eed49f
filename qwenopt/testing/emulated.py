"""CUDA kernels without a GPU: the text of csrc/cuda/kernels as plain C++, its threads as fibers (csrc/cuda/emulate)."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qwenopt.ops.cuda.launch import Launch, Run

ORDERS = {"in turn": 0, "warp by warp": 1, "backwards": 2}
CANARY = 0xA5
ALIGNMENT = 16  # what an address keeps of itself, so that kernels take the same way
# No contraction: a multiply and an add are two roundings, as nvcc and NVRTC are told. The checked longjmp of glibc
# takes a change of stacks for an error.
FLAGS = (
    *("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w"),
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
)


class EmulationError(AssertionError):
    """What a GPU would have done wrong in silence."""


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return next((path for name in ("g++", "clang++") if (path := shutil.which(name))), None)


def build(csrc: Path, library: Path, file: Path | None = None) -> Path:
    """Compile all kernels under `csrc`, or those of one file, into `library`; returns its path."""
    flags = [] if file is None else [f'-DQWENOPT_EMULATED_FILE="{file}"']
    command = [str(compiler()), *FLAGS, *flags, "-o", str(library), str(csrc / "cuda" / "emulate" / "emulate.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


class Emulation:
    """Runs launches; `order` says in which order threads that may go on do so."""

    def __init__(self, library: Path, order: str) -> None:
        self.order = order
        self._lib = ctypes.CDLL(str(library))
        self._lib.emulate_launch.restype = ctypes.c_char_p
        self._lib.emulate_launch.argtypes = [
            ctypes.c_char_p, *[ctypes.c_uint] * 3, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
        ]  # fmt: skip
        self._lib.emulate_kernels.restype = ctypes.c_char_p

    def kernels(self) -> list[str]:
        """The names of all kernels."""
        text: bytes = self._lib.emulate_kernels()
        return text.decode().split()

    def run(self, launch: Launch) -> None:
        """Run one launch to its end; raises EmulationError with what went wrong."""
        error = self._lib.emulate_launch(
            launch.kernel.encode(), *launch.grid, launch.threads, launch.args, len(launch.args), ORDERS[self.order]
        )
        if error is not None:
            raise EmulationError(error.decode())

    def call(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(run, *args)` on tensors of which nothing but their own memory may be written to."""
        guarded = [Guarded(a) if isinstance(a, Tensor) else None for a in args]
        with _GuardedEmpty() as made:
            result = fn(self.run, *(a if g is None else g.tensor for a, g in zip(args, guarded, strict=True)))
        for guard in made.guards:
            guard.check()
        for arg, guard in zip(args, guarded, strict=True):
            if guard is not None:
                guard.check()
                arg.copy_(guard.tensor)
        return result


class Guarded:
    """A tensor moved to pages of its own, same strides and alignment.

    The bytes around it on these pages must stay as they are, and the pages around those cannot even be read: the last
    element stands at most 15 bytes before the end.
    """

    def __init__(self, source: Tensor) -> None:
        last = sum((n - 1) * s for n, s in zip(source.shape, source.stride(), strict=True))
        self.size = (last + 1) * source.element_size() if source.numel() else 0
        usable = -(-(self.size + ALIGNMENT) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = torch.frombuffer(mmap.mmap(-1, usable + 2 * mmap.PAGESIZE), dtype=torch.uint8)
        for page in (0, usable + mmap.PAGESIZE):
            _forbid(pages.data_ptr() + page)
        self.memory = pages[mmap.PAGESIZE : mmap.PAGESIZE + usable]
        self.memory.fill_(CANARY)
        self.begin = usable - self.size - (usable - self.size - source.data_ptr()) % ALIGNMENT
        inner = self.memory[self.begin : self.begin + self.size]
        self.tensor = (
            inner.view(source.dtype).as_strided(source.shape, source.stride()) if self.size else source.clone()
        )
        self.tensor.copy_(source)

    def poison(self) -> None:
        """NaN, or -1, everywhere."""
        self.memory[self.begin : self.begin + self.size] = 0xFF

    def check(self) -> None:
        """Raise if anything around the tensor changed."""
        outside = torch.cat([self.memory[: self.begin], self.memory[self.begin + self.size :]])
        if not (outside == CANARY).all():
            raise EmulationError("a write beside a tensor")


def _forbid(address: int) -> None:
    """Make the page there one that nobody may touch."""
    done = ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0)
    assert done == 0, "mprotect failed"


class _GuardedEmpty(TorchFunctionMode):
    """What is allocated inside: guarded like the arguments, and where it is empty, poisoned (NaN, -1)."""

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[Guarded] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in (torch.empty, torch.empty_like, torch.zeros, Tensor.new_empty):
            return made
        guard = Guarded(made)
        self.guards.append(guard)
        if func is not torch.zeros:
            guard.poison()
        return guard.tensor


def launches(fn: Callable[..., Any], *args: Any) -> list[Launch]:
    """What `fn(run, *args)` would launch."""
    found: list[Launch] = []
    run: Run = found.append
    fn(run, *args)
    return found
