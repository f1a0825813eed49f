"""Decode under Hugging Face continuous batching: its own attention beside ours, eager and compiled by this backend.

One scheduler, one cache and one set of weights; only the attention, and whether the model is compiled, differ. The
prompts stay in the cache between rounds (prefix sharing), so a round is decode but for its first, short step.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bench_generate import filled
from harness import Limits, Results, record

import qwenopt
from qwenopt.cli import speed
from qwenopt.runtime.continuous_batching import use_continuous_batching
from qwenopt.testing.models import full_config

pytest.importorskip("psutil", reason="transformers sizes its cache on a CPU through psutil")

IMPLS = ("sdpa", "paged|eager", "qwenopt attention", "qwenopt")
ROUNDS = 5
PAGE_SIZE = 256
VOCAB = 16384  # cut: with few layers, the output matrix would be all there is to measure


@dataclass(frozen=True)
class Setting:
    """So many rows with so many tokens in the cache, of a model of the shape of Qwen3-0.6B with so many layers."""

    rows: int
    context: int
    layers: int
    steps: int = 8

    def __str__(self) -> str:
        return f"0.6B-{self.layers}-layers-{self.rows}x{self.context}"

    def prompts(self) -> list[list[int]]:
        """All but the last page of each, of 1 to 8 tokens, is found in the cache from the second round on."""
        rng = random.Random(0)
        lengths = [self.context + rng.randint(1, 8) for _ in range(self.rows)]
        return [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]


SETTINGS = [Setting(8, 512, 2), Setting(16, 1024, 4), Setting(16, 2048, 4)]


class Session:
    """One manager of continuous batching with its own cache, on weights shared with other sessions."""

    def __init__(self, model: Any, impl: str, setting: Setting) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.setting, self.impl = setting, impl
        self.model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        self.handle = None
        if impl.startswith("qwenopt"):
            self.handle = use_continuous_batching(self.model)
            if impl == "qwenopt":
                qwenopt.compile(self.model)
        else:
            self.model.set_attn_implementation(impl)
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=setting.steps)
        blocks = setting.rows * (setting.context // PAGE_SIZE + 2)
        # Its default batch is 8192 tokens, for which sdpa's mask would not fit into the memory of a small machine.
        batching = ContinuousBatchingConfig(
            page_size=PAGE_SIZE, num_blocks=2 * blocks, max_batch_tokens=1024, auto_switch_to_flash=False
        )
        self.manager = self.model.init_continuous_batching(generation, batching)
        self.manager.start()

    def round(self) -> list[list[int]]:
        """Generate for all rows at once. Returns the tokens of each."""
        ids = self.manager.add_requests(self.setting.prompts(), max_new_tokens=self.setting.steps)
        found: dict[str, Any] = {}
        while len(found) < len(ids):
            result = self.manager.get_result(timeout=1)
            if result is not None:
                assert not result.error, result.error
                found[result.request_id] = result.generated_tokens
            else:
                assert self.manager.is_running(), "the generation loop ended"
        return [found[i] for i in ids]

    def seconds(self) -> float:
        """The time of one round."""
        start = time.perf_counter()
        self.round()
        return time.perf_counter() - start

    def close(self) -> None:
        self.manager.stop(block=True)
        self.manager.destroy()
        if self.handle is not None:
            self.handle.remove()


def params() -> list[Any]:
    found = []
    for setting in SETTINGS:
        for impl in IMPLS:
            marks = [pytest.mark.ci] if setting is SETTINGS[0] and impl in ("sdpa", "qwenopt") else []
            found.append(pytest.param(setting, impl, marks=marks, id=f"{setting}-{impl}"))
    return found


def cost(model: Any, setting: Setting) -> tuple[int, int, torch.dtype]:
    """Bytes that a round has to read, weights once a step and the keys and values present, and its arithmetic."""
    c = model.config
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2 * setting.rows * setting.context
    weights = speed.bytes_per_token(model)
    return (weights + kv) * setting.steps, weights * setting.rows * setting.steps, torch.bfloat16


@pytest.mark.parametrize(("setting", "impl"), params())
def bench_continuous_batching(benchmark: Any, setting: Setting, impl: str, limits: Limits, results: Results) -> None:
    config = full_config("0.6B", num_hidden_layers=setting.layers, vocab_size=VOCAB)
    model = filled(config)
    theirs, mine = Session(model, "sdpa", setting), Session(model, impl, setting)
    try:
        wanted, found = theirs.round(), mine.round()
        same = statistics.mean(a[0] == b[0] for a, b in zip(wanted, found, strict=True))
        assert same >= 0.5, f"only {same:.0%} of the rows begin with the token that sdpa gives"
        sdpa_seconds: list[float] = []

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            if impl != "sdpa":
                sdpa_seconds.append(theirs.seconds())
            return (), {}

        benchmark.group = f"continuous batching {setting}"
        benchmark.pedantic(mine.round, setup=setup, rounds=ROUNDS, warmup_rounds=1)
        record(benchmark, benchmark.group, impl, limits, results, sdpa_seconds, cost(model, setting))
        benchmark.extra_info |= {"steps": setting.steps, "baseline": "sdpa", "same_first_token": same}
    finally:
        theirs.close()
        mine.close()
