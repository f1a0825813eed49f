"""The CUDA kernels emulated on a CPU, as a fixture; skipped without a C++ compiler."""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

import pytest

from qwenopt.cupy_kernels import nvrtc
from qwenopt.testing import emulated

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler (g++ or clang++) to emulate the CUDA kernels with")
    return emulated.build(ROOT / "csrc", tmp_path_factory.mktemp("emulated") / "kernels.so")


@pytest.fixture
def emulation(library: Path, request: pytest.FixtureRequest) -> emulated.Emulation:
    return emulated.Emulation(library, request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Threads that wait go on in another order: a kernel that lacks a barrier gives other results.
    if "emulation" in metafunc.fixturenames:
        metafunc.parametrize("emulation", list(emulated.ORDERS), indirect=True)


@pytest.fixture(scope="session")
def real_compiler() -> nvrtc.Nvrtc:
    """NVRTC itself. Where its package is installed, as `make test` does, not finding it is a failure."""
    try:
        return nvrtc.load()
    except nvrtc.NvrtcError as error:
        if any(name.startswith("nvidia-cuda-nvrtc") for name in _installed()):
            raise
        pytest.skip(str(error))


def _installed() -> list[str]:
    return [distribution.name for distribution in distributions()]
