"""The CUDA kernels emulated on a CPU, as a fixture; skipped without a C++ compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

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
