"""top_tokens beside torch's own argmax and topk, at Qwen3's vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt.ops.top_tokens import TOP_TOKENS

VOCAB = 151936
SIZES = [(1, 1), (8, 1), (64, 1), (1, 32), (8, 32), (64, 32), (1, 1024)]
CI = SIZES[:2] + SIZES[3:4]
CASES = [
    pytest.param(*size, dtype, id=f"{size[0]} rows-k{size[1]}-{name}", marks=[pytest.mark.ci] if size in CI else [])
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    for size in SIZES
]


@pytest.mark.parametrize(("rows", "k", "dtype"), CASES)
@pytest.mark.parametrize("impl", ["torch", "reference", "cpu"])
def bench_top_tokens(benchmark: Any, rows: int, k: int, dtype: torch.dtype, impl: str) -> None:
    """`torch` leaves open which of equal logits it takes. Bytes are those of the logits, read once."""
    logits = torch.randn(rows, VOCAB).to(dtype)
    if impl == "cpu" and (reason := TOP_TOKENS.choose((logits, k)).reason):
        pytest.skip(reason)
    ways: dict[str, Any] = {
        "torch": lambda: logits.argmax(-1) if k == 1 else logits.topk(k),
        "reference": lambda: TOP_TOKENS.reference(logits, k),
        "cpu": lambda: TOP_TOKENS(logits, k),
    }
    assert torch.equal(TOP_TOKENS(logits, k)[1], TOP_TOKENS.reference(logits, k)[1])
    benchmark.group = f"top_tokens-{rows} rows-k{k}-{dtype}"
    benchmark.extra_info["bytes"] = logits.numel() * dtype.itemsize
    benchmark.pedantic(ways[impl], rounds=30, warmup_rounds=3)
