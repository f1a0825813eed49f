"""A decode step of Qwen3-0.6B's plan on each instruction set, beside a plain read of the same weights in each round."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from bench_generate import random_model

from qwenopt import native
from qwenopt.backend import compile_graph
from qwenopt.cli import measure, speed
from qwenopt.lowering.plan import Planned

ISAS = native.isas() if native.available() else []
ROUNDS = 7


def planned_workload(model: Any, batch: int) -> tuple[speed.Workload, Planned]:
    """A decode, warmed up, and the plan that it runs in."""
    found: list[Planned] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        lowered = compile_graph(gm, inputs, options={"lowering": "direct"})
        found.extend(node.target for node in gm.graph.nodes if isinstance(node.target, Planned))
        return lowered

    call = torch.compile(model.forward, backend=backend, dynamic=False)
    work = speed.Workload("decode", model, call, batch)
    work.first()
    (planned,) = found
    return work, planned


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(request.param)


CASES = [
    pytest.param("0.6B-2-layers", 1, ISAS[-1:], id="0.6B-2-layers-batch1", marks=pytest.mark.ci),
    *(pytest.param("0.6B", batch, ISAS[1:], id=f"0.6B-batch{batch}") for batch in (1, 8)),
]


@pytest.mark.skipif(not ISAS, reason=f"plans are native calls: {native.why_not()}")
@pytest.mark.parametrize(("model", "batch", "isas"), CASES, indirect=["model"])
def bench_plan(benchmark: Any, model: Any, batch: int, isas: list[str]) -> None:
    """Seconds of a step inside the plan; `share_of_read` is that of reading all weights once, by instruction set."""
    work, planned = planned_workload(model, batch)
    lib, threads = native.C(), torch.get_num_threads()
    weights = [p for p in model.parameters() if p.dim() > 1]

    def read() -> None:
        for p in weights:
            lib.read_bandwidth(p.data_ptr(), p.nbytes, threads)

    spent: list[float] = []
    planned.on_profile = lambda steps: spent.append(sum(seconds for _, seconds in steps))

    def run(isa: str) -> float:
        planned.prepare().isa = ISAS.index(isa)
        spent.clear()
        work.run(work.start())
        return statistics.median(spent)

    contenders = {"read": lambda: measure.seconds(read), **{isa: (lambda isa=isa: run(isa)) for isa in isas}}
    for contender in contenders.values():
        contender()
    rounds = measure.alternate(contenders, ROUNDS)
    shares = {isa: [r / s for r, s in zip(rounds["read"], rounds[isa], strict=True)] for isa in isas}
    benchmark.extra_info |= {
        "share_of_read": {isa: measure.spread(values).to_dict() for isa, values in shares.items()},
        "read_gbps": measure.spread([sum(p.nbytes for p in weights) / s / 1e9 for s in rounds["read"]]).to_dict(),
        "step_ms": {isa: measure.spread([s * 1e3 for s in rounds[isa]]).to_dict() for isa in isas},
    }
    benchmark.pedantic(work.run, setup=lambda: ((work.start(),), {}), rounds=3)
