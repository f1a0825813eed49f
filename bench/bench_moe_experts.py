"""moe_experts at the shapes of published models: eager, transformers' grouped_mm and every kernel."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, params
from harness import Limits, Results, implementations, run


@pytest.mark.parametrize("case", params("moe_experts"))
@pytest.mark.parametrize("impl", implementations("moe_experts"))
def bench_moe_experts(benchmark: Any, case: Case, impl: str, limits: Limits, results: Results) -> None:
    run(benchmark, case, impl, limits, results)
