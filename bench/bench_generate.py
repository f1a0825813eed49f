"""Decode and prefill of whole models, cut to few layers: eager, Inductor, and this backend without Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import NOISE_ELEMENTS
from harness import Limits, Results, record

from qwenopt.cli import speed
from qwenopt.testing.models import full_config

# Name -> published model, and what is cut. The vocabulary of the mixture of experts is cut as well: with one layer,
# its output matrix would be all there is to measure.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "0.6B-2-layers": ("0.6B", {"num_hidden_layers": 2}),
    "30B-A3B-1-layer": ("30B-A3B", {"num_hidden_layers": 1, "vocab_size": 16384}),
}
ROUNDS = 7
STD = 0.02


def random_model(name: str) -> Any:
    """The cut model, or a published one whole, in bfloat16, filled with noise."""
    published, changes = MODELS.get(name, (name, {}))
    return filled(full_config(published, **changes))


def filled(config: Any) -> Any:
    """A model of that configuration in bfloat16, filled from a pool of noise."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    pool = torch.randn(NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0)).mul_(STD).to(torch.bfloat16)
    for p in model.parameters():
        if p.dim() == 1:
            p.data.fill_(1.0)
        else:
            p.data = pool.repeat(-(-p.numel() // NOISE_ELEMENTS))[: p.numel()].view(p.shape)
    model.tie_weights()
    return model.eval()


def params() -> list[Any]:
    """Model, kind and implementation. Inductor compiles for long, so the short subset has it only once."""
    found = []
    for name in MODELS:
        for kind in ("decode", "prefill"):
            for impl in ("eager", "inductor", "qwenopt"):
                ci = impl != "inductor" or (name, kind) == ("0.6B-2-layers", "decode")
                marks = [pytest.mark.ci] if ci else []
                found.append(pytest.param(name, kind, impl, marks=marks, id=f"{name}-{kind}-{impl}"))
    return found


@pytest.fixture(scope="module")
def named_model(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, random_model(request.param)


@pytest.mark.parametrize(("named_model", "kind", "impl"), params(), indirect=["named_model"])
def bench_generate(
    benchmark: Any, named_model: tuple[str, Any], kind: str, impl: str, limits: Limits, results: Results
) -> None:
    name, model = named_model
    calls = speed.calls(model, ("eager", impl) if impl != "eager" else ("eager",))
    eager, mine = (speed.Workload(kind, model, calls[which]) for which in ("eager", impl))
    error = speed.logit_error(mine.first()[0], eager.first()[0])
    assert error <= speed.MAX_LOGIT_ERROR, f"logits are {error:.3g} away from eager's, relative to their size"
    mine.tokens_per_second()
    eager_seconds: list[float] = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        if impl != "eager":
            eager_seconds.append(eager.tokens / eager.tokens_per_second())
        return (mine.start(),), {}

    benchmark.group = f"{kind} {name}"
    benchmark.pedantic(mine.run, setup=setup, rounds=ROUNDS, warmup_rounds=1)
    reads = speed.bytes_per_token(model)
    prefill = speed.prefill_flops(model, speed.PREFILL_TOKENS)
    cost = (reads * mine.tokens, reads * mine.tokens) if kind == "decode" else (reads, prefill)
    record(benchmark, f"{kind} {name}", impl, limits, results, eager_seconds, (*cost, torch.bfloat16))
    benchmark.extra_info |= {"tokens": mine.tokens, "logit_error": error}
