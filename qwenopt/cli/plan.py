"""`qwenopt plan`: the code that the direct lowering runs in place of a model's graph."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwenopt.cli import checkpoint, explain

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    explain.add_common(parser)
    parser.add_argument("--phase", choices=explain.PHASES, default="decode", help="which graph (default: decode)")


def run(args: argparse.Namespace) -> int:
    """Print the lowered graph of one call, then run it once to see that it holds."""
    import torch

    from qwenopt.backend import compile_graph
    from qwenopt.report import last_report

    model = checkpoint.load(checkpoint.locate(args.model), args.dtype)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        lowered = compile_graph(gm, inputs, options={"lowering": "direct"})
        print(f"# {last_report().graphs[-1].line()}")
        print(gm.code.strip())
        return lowered

    inputs = explain.inputs_of(model, args.tokens)[args.phase]
    with torch.no_grad():
        torch.compile(model.forward, backend=backend, dynamic=False)(**inputs)
    return 0
