"""No width of the family runs slower than eager: a few layers of each model, decode at batch 1 and 8 and prefill.

As many layers as do not fit a cache, and a small vocabulary, so that the layers are what is measured.
"""

from __future__ import annotations

from typing import Any

import pytest
from bench_generate import filled
from harness import Limits

from qwenopt.cli import measure, speed
from qwenopt.testing.models import full_config

# Layers of each, about 0.8 GB of weights.
LAYERS = {"0.6B": 24, "1.7B": 8, "4B": 4, "8B": 2, "14B": 2, "32B": 1}
WORK = {"decode-batch1": ("decode", 1), "decode-batch8": ("decode", 8), "prefill": ("prefill", 1)}
ROUNDS = 6


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return filled(full_config(request.param, num_hidden_layers=LAYERS[request.param], vocab_size=4096))


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("model", LAYERS, indirect=True)
def bench_widths(benchmark: Any, model: Any, work: str, limits: Limits) -> None:
    """Tokens per second beside eager's, in alternating rounds; `ratio_to_eager` is the median of the rounds' ratios."""
    kind, batch = WORK[work]
    calls = speed.calls(model, ("eager", "qwenopt"))
    both = {name: speed.Workload(kind, model, call, batch) for name, call in calls.items()}
    error = speed.logit_error(both["qwenopt"].first()[0], both["eager"].first()[0])
    assert error <= speed.MAX_LOGIT_ERROR, f"logits are {error:.3g} away from eager's, relative to their size"
    rounds = measure.alternate({name: w.tokens_per_second for name, w in both.items()}, ROUNDS)
    ratio = measure.spread([a / b for a, b in zip(rounds["qwenopt"][1:], rounds["eager"][1:], strict=True)])
    mine = measure.spread(rounds["qwenopt"][1:])
    steps = mine.median / batch
    share = speed.bytes_per_token(model) * steps / 1e9 / limits.gbps if kind == "decode" else None
    benchmark.extra_info |= {
        "ratio_to_eager": ratio.to_dict(),
        "tokens_per_second": mine.to_dict(),
        "share_of_read": share,
        "logit_error": error,
    }
    benchmark.pedantic(both["qwenopt"].run, setup=lambda: ((both["qwenopt"].start(),), {}), rounds=2)
    assert ratio.median >= 1.0, f"{ratio.median:.2f} times as fast as eager ({ratio.low:.2f} - {ratio.high:.2f})"
