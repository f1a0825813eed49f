"""A process that interprets Triton kernels, shared by the tests of this folder; all are skipped without Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from qwenopt.testing.interpreted import Run, interpreter
from qwenopt.testing.releases import release


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("triton") is not None:
        return
    skip = pytest.mark.skip(reason="triton is not installed (pip install triton)")
    for item in items:
        if "tests/triton/" in item.path.as_posix():
            item.add_marker(skip)


@pytest.fixture
def compiles() -> None:
    """Skips where Triton interprets instead."""
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("TRITON_INTERPRET is set: Triton compiles nothing in this process")


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def capability(request: pytest.FixtureRequest, compiles: None) -> int:
    """What to compile for."""
    return int(request.param)


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """`run(name, *args)`: a Triton provider by name, interpreted."""
    import numpy
    import triton

    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        pytest.skip(f"the interpreter of triton {triton.__version__} needs NumPy < 2.4, not {numpy.__version__}")
    with interpreter() as run:
        yield run
