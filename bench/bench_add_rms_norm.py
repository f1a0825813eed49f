"""add_rms_norm at the shapes of published models: eager, Inductor and every kernel."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, params
from harness import Limits, Results, implementations, run


@pytest.mark.parametrize("case", params("add_rms_norm"))
@pytest.mark.parametrize("impl", implementations("add_rms_norm"))
def bench_add_rms_norm(benchmark: Any, case: Case, impl: str, limits: Limits, results: Results) -> None:
    run(benchmark, case, impl, limits, results)
