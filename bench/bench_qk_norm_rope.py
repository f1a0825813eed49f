"""qk_norm_rope at the shapes of published models: eager, Inductor and every kernel."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, params
from harness import Limits, Results, implementations, run


@pytest.mark.parametrize("case", params("qk_norm_rope"))
@pytest.mark.parametrize("impl", implementations("qk_norm_rope"))
def bench_qk_norm_rope(benchmark: Any, case: Case, impl: str, limits: Limits, results: Results) -> None:
    run(benchmark, case, impl, limits, results)
