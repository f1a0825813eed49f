"""Shared by the tests of this folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from qwenopt.testing.fake_cuda import FakeGpu, allow_cuda_views, fake_gpu


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """A GPU that is not there; skips without Triton, whose kernels it takes for its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton)")
    assert allow_cuda_views() is None
    with fake_gpu() as fake:
        yield fake
