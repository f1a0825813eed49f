"""How setup.py builds the CUDA kernels into the native module, and what it does where it cannot."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qwenopt import native
from qwenopt.cupy_kernels import nvrtc

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; it must build nothing."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("qwenopt_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(folder: Path, text: str) -> str:
    path = folder / "nvcc"
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}\n")
    path.chmod(0o755)
    return str(path)


COMPILER = """
if "--version" in sys.argv:
    print("Cuda compilation tools, release 12.4, V12.4.131")
else:
    open(sys.argv[sys.argv.index("-o") + 1], "wb").write(b"image")
"""


def test_architectures(setup: ModuleType) -> None:
    assert setup.gencode("8.0;9.0a+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert setup.gencode("7.5 12.0") == ["-gencode=arch=compute_120,code=sm_120"]
    with pytest.raises(setup.CompileError, match="TORCH_CUDA_ARCH_LIST has 'Hopper'; qwenopt takes numbers"):
        setup.gencode("Hopper")
    with pytest.raises(setup.CompileError, match=r"is '7\.0;7\.5'; the CUDA kernels of qwenopt need 8\.0 or newer"):
        setup.gencode("7.0;7.5")


def test_every_kernel_is_in_the_table(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{Path(script(tmp_path, COMPILER)).parent}{os.pathsep}/bin")
    text = setup.cuda_images(tmp_path)
    files = sorted((ROOT / "csrc/cuda/kernels").glob("*.cuh"))
    kernels = [name for path in files for name in nvrtc.kernel_names(path.read_text())]
    assert all(f'{{"{name}", ' in text for name in kernels)
    assert f"kNumCudaKernels = {len(kernels)};" in text
    assert 'kCudaVersion = "12.4";' in text


@pytest.mark.parametrize("reason", ["none", "fails", "architecture"])
def test_without_a_working_nvcc_the_tables_are_empty(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reason: str,
) -> None:
    if reason == "none":
        monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    else:
        text = COMPILER.replace('b"image")', 'b"")\n    sys.exit("unsupported GNU version")')
        monkeypatch.setattr(setup, "find_nvcc", lambda: script(tmp_path, text))
    if reason == "architecture":
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.0")
    text = setup.cuda_images(tmp_path)
    assert "kNumCudaImages = 0;" in text
    assert "kNumCudaKernels = 0;" in text
    assert 'kCudaVersion = "";' in text
    said = capsys.readouterr().err
    wanted = {"none": "", "fails": "unsupported GNU version", "architecture": "need 8.0 or newer"}[reason]
    assert wanted in said
    assert ("building without CUDA kernels" in said) == (reason != "none")


@pytest.mark.skipif(not native.available(), reason="no native module")
def test_the_native_module_says_what_it_has() -> None:
    info, lib = native.build_info(), native.C()
    assert info["cuda"] == bool(lib.cuda_kernels()) == bool(info["nvcc"])
    if not info["cuda"]:
        assert lib.cuda_missing() == "qwenopt._C was built without CUDA: nvcc was not there"
        return
    files = (ROOT / "csrc/cuda/kernels").glob("*.cuh")
    assert set(lib.cuda_kernels()) == {name for path in files for name in nvrtc.kernel_names(path.read_text())}


@pytest.mark.skipif(not native.available(), reason="no native module")
def test_nothing_of_cuda_is_loaded_by_the_import() -> None:
    native.C()
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    own = next(path for path in libraries if "qwenopt/_C" in path)
    assert b"libcuda.so.1" in Path(own).read_bytes(), "found at run time"
    assert b"libcudart" not in Path(own).read_bytes()
