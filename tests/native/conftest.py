"""Fixtures and small tools for the native kernels: addresses of tensors, and tolerances that follow from the dtype."""

from __future__ import annotations

import pytest
import torch

from qwenopt import native

DTYPES = [torch.float32, torch.bfloat16]
THREADS = 2


def pytest_collection_modifyitems(items):
    if native.available():
        return
    skip = pytest.mark.skip(reason=f"no native module: {native.why_not()}")
    for item in items:
        if "/native/" in str(item.path) and "no_module" not in item.name:
            item.add_marker(skip)


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        names = native.isas() if native.available() else ["generic"]
        metafunc.parametrize("isa", range(len(names)), ids=names)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@pytest.fixture
def C():
    return native.C()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
