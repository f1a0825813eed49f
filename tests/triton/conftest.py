"""A process that interprets Triton kernels, shared by the tests of this folder; all are skipped without Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from qwenopt.testing.interpreted import Run, interpreter

MIN_VERSION = (3, 7)


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
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_VERSION:
        pytest.skip(f"the interpreter of triton {triton.__version__} breaks on NumPy >= 2.4; it needs 3.7 or newer")
    with interpreter() as run:
        yield run
