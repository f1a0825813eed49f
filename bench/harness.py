"""How one implementation of one case is checked, timed beside eager, and set in relation to what the machine can do."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import Case, Work
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qwenopt.cli.measure import seconds
from qwenopt.ops import OPS
from qwenopt.testing import tolerance
from qwenopt.testing.results import results as results_of

# Time for the rounds of one benchmark, eager's included, and the bounds of their number.
BUDGET_SECONDS = 0.6
MIN_ROUNDS, MAX_ROUNDS = 7, 100

# How often read bandwidth is taken among the rounds of one benchmark: on a shared machine it moves all the time.
READS = 5

# Up to this many elements the truth is computed in float64; beyond it, eager in the same dtype is the measure.
MAX_TRUTH_ELEMENTS = 32 << 20
LARGE_SLACK_ULPS = 8

# case -> implementation -> how many times as fast as eager
Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Limits:
    """The ceilings of this run."""

    gbps: float
    gflops: dict[torch.dtype, float]
    source: str
    read_gbps: Callable[[], float]  # reads the memory once more

    def seconds(self, num_bytes: int, flops: int, dtype: torch.dtype) -> float:
        """The least time in which memory and arithmetic can do the work."""
        return max(num_bytes / self.gbps, flops / self.gflops[dtype]) / 1e9


def implementations(op: str) -> list[str]:
    """What there is to compare: Inductor before the kernels, so that they can be set in relation to it."""
    # The expert loop of the reference depends on data, and Inductor would only see its pieces; what people run
    # under it is transformers' grouped_mm.
    others = ["grouped_mm"] if op == "moe_experts" else ["inductor"]
    return ["eager", *others, *(p.name for p in OPS[op].providers)]


def implementation(op: str, name: str, work: Work) -> Callable[..., Any]:
    """The function behind a name. Skips the benchmark where this machine has no such kernel."""
    import pytest  # here, since bench/gpu uses the rest without it

    if name == "eager":
        return OPS[op].reference
    if name == "inductor":
        return torch.compile(OPS[op].reference, dynamic=False)
    if name == "grouped_mm":
        return experts_of_transformers("grouped_mm", *work.variants[0][3:])
    provider = next(p for p in OPS[op].providers if p.name == name)
    reason = provider.available() or provider.accepts(*work.variants[0])
    if reason is not None:
        pytest.skip(f"{op}.{name}: {reason}")
    return provider.fn


def experts_of_transformers(how: str, gate_up_proj: Tensor, down_proj: Tensor, compiled: bool = False) -> Any:
    """The expert layer of transformers on given weights, in its implementation `how`; by Inductor if compiled."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, inter = down_proj.shape
    config = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=inter)
    config._experts_implementation = how
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up_proj, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down_proj, requires_grad=False)
    run = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
    return lambda x, indices, weights, *_: run(x, indices, weights)


def check(op: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """A wrong kernel has no speed: as close to the truth as eager is, up to a factor of two."""
    eager, actual = results_of(OPS[op], OPS[op].reference, args), results_of(OPS[op], fn, args)
    tensors = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
    small = sum(a.numel() for a in tensors) <= MAX_TRUTH_ELEMENTS
    small = small and not any(a.dtype == torch.int8 for a in tensors)
    truth = results_of(OPS[op], OPS[op].reference, tuple(_double(a) for a in args)) if small else eager
    for a, e, t in zip(actual, eager, truth, strict=True):
        if not e.is_floating_point():
            assert torch.equal(a, e), f"{op}: other integers than eager's"
        elif small:
            tolerance.assert_as_accurate(a, e, t.double())
        else:
            found, allowed = tolerance.error(a, e), LARGE_SLACK_ULPS * tolerance.ulp(e, e.dtype)
            assert found <= allowed, f"{op}: {found:.3g} away from eager; allowed {allowed:.3g}"


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return [_double(one) for one in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def run(benchmark: Any, case: Case, name: str, limits: Limits, results: Results) -> None:
    """Check one implementation of a case, then time it, with a timed call of eager before every round."""
    work = case.build()
    fn, eager = implementation(case.op, name, work), OPS[case.op].reference
    check(case.op, fn, work.variants[0])
    variants = itertools.cycle(work.variants)
    eager_seconds: list[float] = []
    reads: list[float] = []
    setups = itertools.count()

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        if next(setups) % max(rounds // READS, 1) == 0:
            reads.append(limits.read_gbps())
        if name != "eager":
            args = next(variants)
            eager_seconds.append(seconds(lambda: eager(*args)))
        return next(variants), {}

    once = seconds(lambda: (eager(*next(variants)), fn(*next(variants))))
    rounds = min(max(int(BUDGET_SECONDS / once), MIN_ROUNDS), MAX_ROUNDS)
    benchmark.group = f"{case.op} {case}"
    benchmark.pedantic(fn, setup=setup, rounds=rounds, warmup_rounds=2)
    limits = replace(limits, gbps=statistics.median(reads))
    record(benchmark, benchmark.group, name, limits, results, eager_seconds, (work.num_bytes, work.flops, case.dtype))


def record(
    benchmark: Any,
    case: str,
    name: str,
    limits: Limits,
    results: Results,
    eager_seconds: list[float],
    cost: tuple[int, int, torch.dtype],
) -> None:
    """Write speed, ceilings and ratios into the benchmark's JSON. A ratio of 2 is twice as fast."""
    num_bytes, flops, dtype = cost
    benchmark.extra_info |= {"case": case, "impl": name, "dtype": str(dtype), "bytes": num_bytes, "flops": flops}
    if benchmark.disabled:  # --benchmark-disable runs everything once, to see that it works
        return
    median = benchmark.stats.stats.median
    ratio = statistics.median(eager_seconds) / median if eager_seconds else 1.0
    of_case = results.setdefault(case, {})
    of_case[name] = ratio
    benchmark.extra_info |= {
        "ceiling_gbps": limits.gbps,
        "ceiling_gflops": limits.gflops[dtype],
        "ceiling_source": limits.source,
        "gbps": num_bytes / median / 1e9,
        "gflops": flops / median / 1e9,
        "share_of_ceiling": limits.seconds(num_bytes, flops, dtype) / median,
        "ratio_to_eager": ratio,
    }
    for other in ("inductor", "grouped_mm"):
        if other in of_case and name != other:
            benchmark.extra_info[f"ratio_to_{other}"] = ratio / of_case[other]
