"""Decode steps over a paged cache that is already full of tokens, beside transformers' StaticCache and a plain read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_generate import random_model

import qwenopt
from qwenopt import native
from qwenopt.cli import measure, speed
from qwenopt.runtime.packed_batch import PackedBatch
from qwenopt.runtime.sample import Sampler
from qwenopt.runtime.step import Stepper
from qwenopt.runtime.tail import Tail

ROUNDS, STEPS = 7, 4
STATIC_LENGTH = 8192  # of a static cache; what is there of it is the case's


class Paged:
    """Rows of `present` tokens each, and a decode step of all of them."""

    def __init__(self, model: Any, rows: int, present: int, page_size: int = 16, tail: Tail | None = None) -> None:
        pages = rows * -(-(present + STEPS) // page_size)
        self.cache = qwenopt.PagedKVCache(
            model.config, max_batch_size=rows, num_pages=pages, page_size=page_size, dtype=torch.bfloat16
        )
        noise = torch.randn(self.cache.pools[0][0].shape).to(torch.bfloat16)
        for keys, values, *_ in self.cache.pools:
            keys.copy_(noise)
            values.copy_(noise)
        self.present = present
        self.rows = [self.cache.open() for _ in range(rows)]
        for row in self.rows:
            self.cache.rows.reserve({row: present})
            self.cache.rows.advance(row, present)
        tail = tail or Tail(Sampler(rows, greedy=True))
        self.stepper, self.batch = Stepper(model, tail, {"lowering": "direct"}), PackedBatch(self.cache, rows, rows)
        self.emit, self.out = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)

    def step(self) -> None:
        """One more token in each row."""
        self.batch.fill([(row, [1]) for row in self.rows])
        self.stepper(self.batch, self.emit, self.out)

    def run(self) -> float:
        """Seconds of a step."""
        for row in self.rows:
            self.cache.crop_row(row, self.present)
        return measure.seconds(lambda: [self.step() for _ in range(STEPS)]) / STEPS


def static(model: Any, call: Callable[..., Any], rows: int, present: int) -> Callable[[], float]:
    """Seconds of a step over transformers' StaticCache of STATIC_LENGTH with `present` tokens."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=STATIC_LENGTH)
    config = model.config
    cache.early_initialization(rows, config.num_key_value_heads, config.head_dim, torch.bfloat16, "cpu")
    for layer in cache.layers:
        layer.keys[:, :, :present].normal_()
        layer.values[:, :, :present].normal_()
    ids = torch.ones(rows, 1, dtype=torch.int64)

    def step() -> None:
        call(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

    def run() -> float:
        for layer in cache.layers:
            layer.cumulative_length.fill_(present)
        return measure.seconds(lambda: [step() for _ in range(STEPS)]) / STEPS

    return run


CASES = [
    pytest.param("0.6B-2-layers", 4, 1024, True, id="0.6B-2-layers-4x1k-beside-static", marks=pytest.mark.ci),
    pytest.param("0.6B", 16, 2048, False, id="0.6B-16x2k"),
    pytest.param("0.6B", 4, 1024, True, id="0.6B-4x1k-beside-static"),
    pytest.param("0.6B", 1, 32768, False, id="0.6B-1x32k"),
]


@pytest.mark.skipif(not native.available(), reason=f"a step is one native call: {native.why_not()}")
@pytest.mark.parametrize(("name", "rows", "present", "beside_static"), CASES)
def bench_paged_cache(benchmark: Any, name: str, rows: int, present: int, beside_static: bool) -> None:
    """`share_of_read`: of reading once the weights and the keys and values that are there."""
    model = random_model(name)
    paged = Paged(model, rows, present)
    lib, threads = native.C(), torch.get_num_threads()
    weights = speed.bytes_per_token(model)
    keys = sum(2 * k[0].nbytes * -(-present * rows // paged.cache.page_size) for k, *_ in paged.cache.pools)
    scratch = torch.ones(weights, dtype=torch.uint8)
    contenders: dict[str, Callable[[], float]] = {
        "read": lambda: measure.seconds(lambda: lib.read_bandwidth(scratch.data_ptr(), scratch.nbytes, threads)),
        "paged": paged.run,
    }
    if beside_static:
        contenders["static"] = static(model, model.forward, rows, present)
    for contender in contenders.values():
        contender()
    rounds = measure.alternate(contenders, ROUNDS)
    ideal = [seconds * (weights + keys) / weights for seconds in rounds["read"]]
    benchmark.extra_info |= {
        "step_ms": {k: measure.spread([s * 1e3 for s in v]).to_dict() for k, v in rounds.items()},
        "kv_bytes": keys,
        "weight_bytes": weights,
        "share_of_read": measure.spread([a / b for a, b in zip(ideal, rounds["paged"], strict=True)]).to_dict(),
    }
    if beside_static:
        ratios = [a / b for a, b in zip(rounds["static"], rounds["paged"], strict=True)]
        benchmark.extra_info["ratio_to_static"] = measure.spread(ratios).to_dict()
    benchmark.pedantic(paged.run, rounds=3)
