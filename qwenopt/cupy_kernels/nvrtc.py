"""NVRTC, NVIDIA's run-time compiler, through ctypes: it needs neither a GPU nor a driver.

The library comes with PyTorch for CUDA, or from the package `nvidia-cuda-nvrtc`, or with a CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAJORS = (13, 12)  # newest first
INSTALL = "pip install nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12"


class NvrtcError(RuntimeError):
    """NVRTC is not there, or a source does not compile; the text says which."""


@dataclass(frozen=True)
class Nvrtc:
    """The loaded library."""

    lib: Any
    version: tuple[int, int]

    def cubin(self, source: str, name: str, options: Sequence[str]) -> bytes:
        """The machine code of `source`; raises NvrtcError with the compiler's log."""
        return self.compile(source, name, options)[0]

    def compile(self, source: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
        """The machine code of `source` and the compiler's log; raises NvrtcError with that."""
        program = ctypes.c_void_p()
        self._check(
            self.lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None), name
        )
        try:
            given = [option.encode() for option in options]
            code = self.lib.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
            found = self._text(program, self.lib.nvrtcGetProgramLogSize, self.lib.nvrtcGetProgramLog)
            log = found.rstrip(bytes(1)).decode(errors="replace")
            if code:
                raise NvrtcError(
                    f"nvrtc: {name} does not compile with {' '.join(options)} (NVRTC {self.dotted}): "
                    f"{self._why(code)}\n{log}"
                )
            return self._text(program, self.lib.nvrtcGetCUBINSize, self.lib.nvrtcGetCUBIN), log
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))

    @property
    def dotted(self) -> str:
        """The version as text."""
        return ".".join(map(str, self.version))

    def architectures(self) -> list[int]:
        """What it can compile for: 75, 80, ..."""
        count = ctypes.c_int()
        self._check(self.lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "architectures")
        found = (ctypes.c_int * count.value)()
        self._check(self.lib.nvrtcGetSupportedArchs(found), "architectures")
        return list(found)

    def _text(self, program: Any, size_of: Callable[..., int], get: Callable[..., int]) -> bytes:
        size = ctypes.c_size_t()
        self._check(size_of(program, ctypes.byref(size)), "size")
        text = ctypes.create_string_buffer(size.value)
        self._check(get(program, text), "text")
        return text.raw

    def _check(self, code: int, what: str) -> None:
        if code:
            raise NvrtcError(f"nvrtc: {what}: {self._why(code)}")

    def _why(self, code: int) -> str:
        text: bytes = self.lib.nvrtcGetErrorString(code)
        return text.decode()


def _packaged(major: int) -> Iterator[Path]:
    """The libraries of that major version which came as Python packages."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        yield from sorted(Path(place).glob(f"*/lib/libnvrtc.so.{major}"))


def _candidates(major: int | None) -> Iterator[str]:
    for one in MAJORS if major is None else (major,):
        yield from map(str, _packaged(one))
        yield f"libnvrtc.so.{one}"
        yield f"/usr/local/cuda/lib64/libnvrtc.so.{one}"


def load(major: int | None = None) -> Nvrtc:
    """The NVRTC of that CUDA major version (None: the newest). Raises NvrtcError with what to install."""
    for path in _candidates(major):
        try:
            lib = ctypes.CDLL(path)
        except OSError:
            continue
        lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        high, low = ctypes.c_int(), ctypes.c_int()
        lib.nvrtcVersion(ctypes.byref(high), ctypes.byref(low))
        return Nvrtc(lib, (high.value, low.value))
    wanted = f"libnvrtc.so.{major}" if major is not None else "libnvrtc.so.13 or .12"
    raise NvrtcError(f"nvrtc: {wanted} is not found; {INSTALL}")


def architecture(capability: tuple[int, int], nvrtc: Nvrtc) -> str:
    """The `sm_..` to compile for; raises NvrtcError where this NVRTC does not know the device."""
    number = capability[0] * 10 + capability[1]
    known = nvrtc.architectures()
    if number not in known:
        raise NvrtcError(
            f"nvrtc: compute capability {capability[0]}.{capability[1]} and NVRTC {nvrtc.dotted}, which knows "
            f"{', '.join(f'{a // 10}.{a % 10}' for a in known)}; {INSTALL} of a version that knows it"
        )
    return f"sm_{number}"


def kernel_names(source: str) -> list[str]:
    """The kernels that a .cuh text defines."""
    return re.findall(r"^QWENOPT_KERNEL\((\w+),", source, re.MULTILINE)
