"""What every test shares: fixed seeds, two threads, a clean Dynamo, no network, and the skip of GPU tests."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

# Before transformers is imported: nothing here may ask a model hub, and forked tokenizers only warn.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util

import pytest
import torch

MAX_THREADS = 2

if importlib.util.find_spec("hypothesis") is not None:  # the tests marked gpu run without it
    from hypothesis import settings

    # The same examples in every run: a failure that comes and goes helps nobody.
    settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(MAX_THREADS, torch.get_num_threads()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Seed before the test; afterwards drop what Dynamo compiled, if it was used at all, and the reports.

    Dynamo's reset drops the reports of backends that it knows; a test may call the backend itself.
    """
    random.seed(0)
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if "qwenopt.report" in sys.modules:
        sys.modules["qwenopt.report"].clear()
