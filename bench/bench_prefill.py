"""Reading a prompt in `qwenopt.generate`, by plan and node by node, beside compiled `model(...)` and eager."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from bench_generate import random_model

import qwenopt
from qwenopt import native
from qwenopt.cli import measure, speed
from qwenopt.lowering.planned import SizedPlanned

ROUNDS, TOKENS = 7, speed.PREFILL_TOKENS
CASES = [pytest.param("0.6B-2-layers", marks=pytest.mark.ci), "0.6B"]


@pytest.mark.skipif(not native.available(), reason=f"plans are native: {native.why_not()}")
@pytest.mark.parametrize("name", CASES)
def bench_prefill(benchmark: Any, name: str) -> None:
    """`tokens_per_second` of each, and how many times as fast the plan is (`ratio_to_...`), in the same rounds."""
    model = random_model(name)
    cache = qwenopt.PagedKVCache(model.config, max_batch_size=1, num_pages=TOKENS // 32 + 1, page_size=32)
    seeds = itertools.count()

    def generate() -> float:
        cache.reset()
        ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(next(seeds)))
        out = qwenopt.generate(
            model, ids, max_new_tokens=1, temperature=0.0, cache=cache, options={"lowering": "direct"}
        )
        return TOKENS / out.timings.prefill_seconds

    def node_by_node() -> float:
        with mock.patch.object(SizedPlanned, "_find", return_value=None):
            return generate()

    calls = speed.calls(model, ("eager", "qwenopt"))
    others = {impl: speed.Workload("prefill", model, call) for impl, call in calls.items()}
    for one in others.values():
        one.first()
    contenders: dict[str, Callable[[], float]] = {
        "plan": generate,
        "nodes": node_by_node,
        "model": others["qwenopt"].tokens_per_second,
        "eager": others["eager"].tokens_per_second,
    }
    for contender in contenders.values():
        contender()
    rounds = measure.alternate(contenders, ROUNDS)
    benchmark.extra_info["tokens_per_second"] = {k: measure.spread(v).to_dict() for k, v in rounds.items()}
    for other in ("nodes", "model", "eager"):
        ratios = [a / b for a, b in zip(rounds["plan"], rounds[other], strict=True)]
        benchmark.extra_info[f"ratio_to_{other}"] = measure.spread(ratios).to_dict()
    benchmark.pedantic(generate, rounds=3)
