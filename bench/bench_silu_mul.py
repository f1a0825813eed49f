"""silu_mul at the shapes of published models: eager, Inductor and every kernel."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, params
from harness import Limits, Results, implementations, run


@pytest.mark.parametrize("case", params("silu_mul"))
@pytest.mark.parametrize("impl", implementations("silu_mul"))
def bench_silu_mul(benchmark: Any, case: Case, impl: str, limits: Limits, results: Results) -> None:
    run(benchmark, case, impl, limits, results)
