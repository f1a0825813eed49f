"""The CUDA sources that are installed with the package, and what they compile to, kept on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

from qwenopt.cupy_kernels import nvrtc

# As csrc is built by setup.py: no contraction, so that a multiply and an add round twice unless a kernel asks for fmaf.
OPTIONS = ("--std=c++17", "--fmad=false")


@functools.cache
def folder() -> Path:
    """Where the .cuh files are."""
    return Path(str(resources.files("qwenopt.cuda_src")))


@functools.cache
def _by_kernel() -> dict[str, str]:
    return {name: path.name for path in sorted(folder().glob("*.cuh")) for name in nvrtc.kernel_names(path.read_text())}


def file_of(kernel: str) -> str:
    """The name of the file that defines a kernel."""
    return _by_kernel()[kernel]


def cache_folder() -> Path:
    """Where compiled kernels are kept: what the XDG base directory specification says."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qwenopt" / "cuda"


def key(name: str, arch: str, compiler: nvrtc.Nvrtc) -> str:
    """What a compiled file depends on: all texts (a file includes others), the options, the device, the compiler."""
    texts = [f"{path.name}\0{path.read_text()}\0" for path in sorted(folder().glob("*.cuh"))]
    parts = "\0".join([name, arch, compiler.dotted, *OPTIONS, *texts])
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def cubin(name: str, arch: str, compiler: nvrtc.Nvrtc, cache: Path | None = None) -> bytes:
    """The machine code of file `name` for `arch` (`sm_90`): from the cache, else compiled, with a line on stderr."""
    kept = (cache_folder() if cache is None else cache) / f"{Path(name).stem}-{arch}-{key(name, arch, compiler)}.cubin"
    found = _read(kept)
    if found is not None:
        return found
    print(f"qwenopt: compiling {name} for {arch} (NVRTC {compiler.dotted}) ...", end=" ", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    try:
        made = compiler.cubin((folder() / name).read_text(), name, options(arch))
    except nvrtc.NvrtcError:
        print("failed", file=sys.stderr)
        raise
    why = _write(kept, made)
    print(f"{time.perf_counter() - begin:.1f} s{why}", file=sys.stderr)
    return made


def options(arch: str) -> list[str]:
    """The options that a file is compiled with."""
    return [*OPTIONS, f"--gpu-architecture={arch}", f"--include-path={folder()}"]


def _read(path: Path) -> bytes | None:
    """What is kept, or None where nothing is or it is no machine code (a write that was cut off)."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    return found if found.startswith(b"\x7fELF") else None


def _write(path: Path, made: bytes) -> str:
    """Keep it, whole or not at all; returns what to say where that fails: nothing else depends on it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(made)
        os.replace(file.name, path)
    except OSError as error:
        return f"; not kept for the next process ({error})"
    return ""
