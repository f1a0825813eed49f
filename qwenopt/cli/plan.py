"""`qwenopt plan`: what the direct lowering runs in place of a model's graph, and where its time goes."""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwenopt.cli import checkpoint, console, explain, measure

if TYPE_CHECKING:
    import torch

    from qwenopt.lowering.plan import Planned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    explain.add_common(parser)
    parser.add_argument("--phase", choices=explain.PHASES, default="decode", help="which graph (default: decode)")
    parser.add_argument("--profile", type=int, default=0, metavar="RUNS", help="time each step, medians of RUNS runs")


def run(args: argparse.Namespace) -> int:
    """Print the lowered graph of one call, then run it once to see that it holds."""
    import torch

    from qwenopt.backend import compile_graph
    from qwenopt.lowering.plan import Planned
    from qwenopt.report import last_report

    model = checkpoint.load(checkpoint.locate(args.model), args.dtype)

    plans: list[Planned] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        lowered = compile_graph(gm, inputs, options={"lowering": "direct"})
        print(f"# {last_report().graphs[-1].line()}")
        print(gm.code.strip())
        for planned in (node.target for node in gm.graph.nodes if isinstance(node.target, Planned)):
            print(planned.listing())
            plans.append(planned)
        return lowered

    inputs = explain.inputs_of(model, args.tokens)[args.phase]
    compiled = torch.compile(model.forward, backend=backend, dynamic=False)
    with torch.no_grad():
        compiled(**inputs)
        if args.profile > 0:
            _profile(plans, lambda: compiled(**inputs), args.profile)
    return 0


def _profile(plans: list[Planned], call: Callable[[], object], runs: int) -> None:
    """Run `runs` times and print what the steps of all plans took, by op."""
    rounds: list[Counter[str]] = []
    totals: list[float] = []

    def note(spent: list[tuple[str, float]]) -> None:
        for name, seconds in spent:
            rounds[-1][name] += seconds  # type: ignore[assignment]

    for planned in plans:
        planned.on_profile = note
    for _ in range(runs + 1):
        rounds.append(Counter())
        totals.append(measure.seconds(call))
    rows = [(name, statistics.median(r[name] for r in rounds[1:])) for name in rounds[0]]
    rows.sort(key=lambda row: -row[1])
    total = statistics.median(totals[1:])
    rows.append(("outside of plans", total - sum(seconds for _, seconds in rows)))
    cells = [[name, f"{seconds * 1e3:.3f} ms", f"{seconds / total:.1%}"] for name, seconds in rows]
    print(console.table(["step", f"median of {runs}", "share"], cells))
