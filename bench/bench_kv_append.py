"""kv_append of a decode step and of a prefill: eager, Inductor and every kernel."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, params
from harness import Limits, Results, implementations, run


@pytest.mark.parametrize("case", params("kv_append"))
@pytest.mark.parametrize("impl", implementations("kv_append"))
def bench_kv_append(benchmark: Any, case: Case, impl: str, limits: Limits, results: Results) -> None:
    run(benchmark, case, impl, limits, results)
