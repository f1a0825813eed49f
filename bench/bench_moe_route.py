"""moe_route at the shapes of published models: eager, Inductor and every kernel."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, params
from harness import Limits, Results, implementations, run


@pytest.mark.parametrize("case", params("moe_route"))
@pytest.mark.parametrize("impl", implementations("moe_route"))
def bench_moe_route(benchmark: Any, case: Case, impl: str, limits: Limits, results: Results) -> None:
    run(benchmark, case, impl, limits, results)
