"""`qwenopt explain`: what the backend does to a model's prefill and decode graphs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenopt.cli import arguments, checkpoint, console, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwenopt.report import Report

PHASES = ("prefill", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `explain`."""
    add_common(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a web page")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Declare what `explain` and `plan` share."""
    arguments.add_model(parser)
    arguments.add_dtype(parser)
    parser.add_argument("--tokens", type=arguments.positive, default=16, metavar="N", help="length of the prompt")
    arguments.add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report of one prefill and one decode step."""
    from qwenopt import api
    from qwenopt.report import Report

    for path in (args.json, args.html):
        console.check_writable(path)
    model = checkpoint.load(checkpoint.locate(args.model), args.dtype)
    graphs = []
    with console.Waiting("compiling prefill and decode"):
        for inputs in inputs_of(model, args.tokens).values():
            graphs += api.explain(model, **inputs).graphs
    report = Report(graphs)
    print(report)
    for name, count in report.counts.items():
        print(f"  {name:14} {count} sites in {len(graphs)} graphs")
    _write(report, args)
    return 0


def _write(report: Report, args: argparse.Namespace) -> None:
    if args.json is not None:
        console.write_json(args.json, report.to_dict())
    if args.html is not None:
        report.to_html(args.html)


def inputs_of(model: PreTrainedModel, tokens: int) -> dict[str, dict[str, Any]]:
    """Arguments of one prefill and of one decode step, on one static cache."""
    import torch

    cache = stream.static_cache(model, tokens + 1)
    generator = torch.Generator().manual_seed(0)
    shared = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    return {
        phase: shared | {"input_ids": torch.randint(0, model.config.vocab_size, (1, length), generator=generator)}
        for phase, length in zip(PHASES, (tokens, 1), strict=True)
    }
