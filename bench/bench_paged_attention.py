"""paged_attention, decoding (equal, long and ragged rows) and a chunk of a prefill: eager, Inductor, every kernel."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, params
from harness import Limits, Results, implementations, run


@pytest.mark.parametrize("case", params("paged_attention"))
@pytest.mark.parametrize("impl", implementations("paged_attention"))
def bench_paged_attention(benchmark: Any, case: Case, impl: str, limits: Limits, results: Results) -> None:
    run(benchmark, case, impl, limits, results)
