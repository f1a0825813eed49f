"""Machine facts in the JSON, the ceilings of this run, and results that later benchmarks of a case compare with."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from harness import Limits, Results

from qwenopt.cli import machine, measure


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Put what decides over speed beside pytest-benchmark's own facts."""
    machine_info["qwenopt"] = machine.facts(torch.get_num_threads())


@pytest.fixture(scope="session")
def limits() -> Limits:
    """Read bandwidth and peak arithmetic of this run, with the kernels' number of threads."""
    ceilings = measure.Ceilings()
    return Limits(
        gbps=statistics.median(ceilings.read_gbps() for _ in range(5)),
        gflops={torch.bfloat16: ceilings.bf16_gflops(), torch.float32: ceilings.matmul_gflops("float32")},
        source=ceilings.source,
        read_gbps=ceilings.read_gbps,
    )


@pytest.fixture(scope="session")
def results() -> Results:
    """Ratios to eager of this run by case and implementation."""
    return {}


@pytest.fixture(autouse=True)
def _inference() -> Any:
    """No gradients, and no compiled code left over from another benchmark."""
    with torch.no_grad():
        yield
    torch._dynamo.reset()
