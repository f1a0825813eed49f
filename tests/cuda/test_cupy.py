"""CUDA text compiled at run time: the compiler, the files that are kept, what is said where something is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenopt.cupy_kernels import launch, nvrtc, sources

KERNEL = "budget_step.cuh"


class Compiler:
    """Stands in for NVRTC: counts, and gives what looks like machine code."""

    def __init__(self, dotted: str = "13.0") -> None:
        self.dotted, self.calls = dotted, 0

    def cubin(self, source: str, name: str, options: Any) -> bytes:
        self.calls += 1
        return b"\x7fELF" + name.encode()

    def architectures(self) -> list[int]:
        return [80, 90]


@pytest.fixture
def compiler() -> Any:
    return Compiler()


def test_the_second_time_nothing_is_compiled(compiler: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = sources.cubin(KERNEL, "sm_90", compiler, tmp_path)
    said = capsys.readouterr().err
    assert said.startswith("qwenopt: compiling budget_step.cuh for sm_90 (NVRTC 13.0) ... ")
    assert said.endswith(" s\n")
    assert sources.cubin(KERNEL, "sm_90", compiler, tmp_path) == first
    assert compiler.calls == 1
    assert capsys.readouterr().err == ""


def test_what_is_kept_is_for_one_device_compiler_and_text(
    compiler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources.cubin(KERNEL, "sm_90", compiler, tmp_path)
    sources.cubin(KERNEL, "sm_80", compiler, tmp_path)
    assert compiler.calls == 2
    newer: Any = Compiler("13.1")
    sources.cubin(KERNEL, "sm_90", newer, tmp_path)
    assert newer.calls == 1
    copy = tmp_path / "text"
    copy.mkdir()
    for path in sources.folder().glob("*.cuh"):
        changed = path.read_text() + ("// changed\n" if path.name == "common.cuh" else "")
        (copy / path.name).write_text(changed)
    monkeypatch.setattr(sources, "folder", lambda: copy)
    sources.cubin(KERNEL, "sm_90", compiler, tmp_path)
    assert compiler.calls == 3, "a file that is included has changed"


def test_a_file_that_was_cut_off_is_made_anew(compiler: Any, tmp_path: Path) -> None:
    made = sources.cubin(KERNEL, "sm_90", compiler, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"")
    assert sources.cubin(KERNEL, "sm_90", compiler, tmp_path) == made
    assert kept.read_bytes() == made


def test_a_folder_that_cannot_be_written_to_costs_only_time(
    compiler: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert sources.cubin(KERNEL, "sm_90", compiler, tmp_path / "file" / "below").startswith(b"\x7fELF")
    assert "not kept for the next process (" in capsys.readouterr().err


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda _: iter(["/nowhere/libnvrtc.so.13"]))
    with pytest.raises(nvrtc.NvrtcError, match=r"libnvrtc\.so\.13 or \.12 is not found; pip install nvidia-cuda-nvrtc"):
        nvrtc.load()


def test_a_device_that_the_compiler_does_not_know_is_named(compiler: Any) -> None:
    assert nvrtc.architecture((9, 0), compiler) == "sm_90"
    with pytest.raises(nvrtc.NvrtcError, match=r"compute capability 12\.0 and NVRTC 13\.0, which knows 8\.0, 9\.0"):
        nvrtc.architecture((12, 0), compiler)


def test_a_text_that_does_not_compile_says_where(real_compiler: nvrtc.Nvrtc) -> None:
    with pytest.raises(nvrtc.NvrtcError, match=r'(?s)x\.cuh does not compile.*x\.cuh\(2\).*"nothing" is undefined'):
        real_compiler.cubin("// a line\nint x = nothing;", "x.cuh", sources.options("sm_80"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """What a CuPy that only takes notes was asked to start."""
    calls: list[Any] = []

    class Module:
        def load(self, made: bytes) -> None:
            calls.append(("load", made))

        def get_function(self, name: str) -> Any:
            return lambda grid, block, args, stream: calls.append((name, grid, block, args, stream.ptr))

    class Device:
        def __init__(self, number: int) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...

    cuda = SimpleNamespace(Module=Module, Device=Device, is_available=lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, __spec__=SimpleNamespace()))
    monkeypatch.setattr(nvrtc, "load", lambda major=None: Compiler())
    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path)
    caches = (launch.why_not, launch._compiler, launch._module, launch._function)
    for cached in caches:
        cached.cache_clear()
    yield calls
    for cached in caches:
        cached.cache_clear()


def test_a_kernel_is_loaded_once_and_gets_its_struct_by_value(started: list[Any]) -> None:
    for _ in range(2):
        launch.start("budget_step", (3, 1, 1), 32, bytes(range(80)), 1, 99, (9, 0), 13)
    (_, image), first, second = started
    assert image == b"\x7fELFbudget_step.cuh"
    name, grid, block, (struct,), stream = first
    assert (name, grid, block, stream) == ("budget_step", (3, 1, 1), (32, 1, 1), 99)
    assert struct.size == 1, "an array of one element is passed by value"
    assert struct.tobytes() == bytes(range(80))
    assert second[0] == "budget_step"


def test_why_cupy_cannot_be_used(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.why_not((9, 0), 13) is None
    assert "compute capability 12.0" in str(launch.why_not((12, 0), 13))
    launch.why_not.cache_clear()
    monkeypatch.setattr(sys.modules["cupy"].cuda, "is_available", lambda: False)
    assert "cupy finds no CUDA device" in str(launch.why_not((9, 0), 13))
    launch.why_not.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda _: None)
    assert launch.why_not((9, 0), 13) == "cupy is not installed (pip install cupy-cuda13x)"
