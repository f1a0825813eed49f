"""A decode step as `qwenopt.generate` makes it, beside compiled `model(...)`, eager, and a plain read of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_generate import random_model
from bench_paged_cache import Paged

from qwenopt import native
from qwenopt.cli import measure, speed

ROUNDS = 7
PRESENT = 32  # tokens in each row

CASES = [
    pytest.param("0.6B-2-layers", 1, id="0.6B-2-layers-batch1", marks=pytest.mark.ci),
    *(pytest.param("0.6B", batch, id=f"0.6B-batch{batch}") for batch in (1, 8, 16)),
]


@pytest.mark.skipif(not native.available(), reason=f"a step is one native call: {native.why_not()}")
@pytest.mark.parametrize(("name", "batch"), CASES)
def bench_step(benchmark: Any, name: str, batch: int) -> None:
    """`ratio_to_...` of steps in the same rounds; `share_of_read` is that of reading all weights once."""
    model = random_model(name)
    paged = Paged(model, batch, PRESENT)
    work = {
        impl: speed.Workload("decode", model, call, batch)
        for impl, call in speed.calls(model, ("eager", "qwenopt")).items()
    }
    lib, threads = native.C(), torch.get_num_threads()
    weights = [p for p in model.parameters() if p.dim() > 1]

    def read() -> None:
        for p in weights:
            lib.read_bandwidth(p.data_ptr(), p.nbytes, threads)

    contenders: dict[str, Callable[[], float]] = {
        "read": lambda: measure.seconds(read),
        "step": paged.run,
        "model": lambda: batch / work["qwenopt"].tokens_per_second(),
        "eager": lambda: batch / work["eager"].tokens_per_second(),
    }
    for one in work.values():
        one.first()
    for contender in contenders.values():
        contender()
    rounds = measure.alternate(contenders, ROUNDS)
    ratios = {k: [a / b for a, b in zip(rounds[k], rounds["step"], strict=True)] for k in ("read", "model", "eager")}
    benchmark.extra_info |= {
        "step_ms": {k: measure.spread([s * 1e3 for s in v]).to_dict() for k, v in rounds.items()},
        "share_of_read": measure.spread(ratios["read"]).to_dict(),
        "ratio_to_model": measure.spread(ratios["model"]).to_dict(),
        "ratio_to_eager": measure.spread(ratios["eager"]).to_dict(),
    }
    benchmark.pedantic(paged.run, rounds=3)
