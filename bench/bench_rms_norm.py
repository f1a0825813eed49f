"""rms_norm at the shapes of published models: eager, Inductor and every kernel."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, params
from harness import Limits, Results, implementations, run


@pytest.mark.parametrize("case", params("rms_norm"))
@pytest.mark.parametrize("impl", implementations("rms_norm"))
def bench_rms_norm(benchmark: Any, case: Case, impl: str, limits: Limits, results: Results) -> None:
    run(benchmark, case, impl, limits, results)
