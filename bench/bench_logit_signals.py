"""logit_signals beside the same by torch's operations (the reference), at Qwen3's vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import check

from qwenopt.ops.logit_signals import LOGIT_SIGNALS

VOCAB, END = 151936, 151668
CASES = [
    pytest.param(rows, dtype, id=f"{rows} rows-{str(dtype)[6:]}", marks=[pytest.mark.ci] if rows < 64 else [])
    for dtype in (torch.bfloat16, torch.float32)
    for rows in (1, 8, 64)
]


@pytest.mark.parametrize(("rows", "dtype"), CASES)
@pytest.mark.parametrize("signals", ["margin", "entropy"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def bench_logit_signals(benchmark: Any, rows: int, dtype: torch.dtype, signals: str, impl: str) -> None:
    """Bytes are those of the logits, read once."""
    logits, entropy = torch.randn(rows, VOCAB).to(dtype), signals == "entropy"
    if impl == "cpu" and (reason := LOGIT_SIGNALS.choose((logits, END, entropy)).reason):
        pytest.skip(reason)
    fn: Any = LOGIT_SIGNALS if impl == "cpu" else LOGIT_SIGNALS.reference
    check("logit_signals", fn, (logits, END, entropy))
    benchmark.group = f"logit_signals-{signals}-{rows} rows-{dtype}"
    benchmark.extra_info["bytes"] = logits.numel() * dtype.itemsize
    benchmark.pedantic(fn, (logits, END, entropy), rounds=30, warmup_rounds=3)
