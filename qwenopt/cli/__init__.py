"""The `qwenopt` command: one module of this package for each of its commands. Only a command that runs loads torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from qwenopt import __version__
from qwenopt.cli import bench, calibrate, demo, doctor, explain, generate, plan
from qwenopt.errors import QwenoptError


class Command(NamedTuple):
    """One command: its name, what it does, the module functions behind it, and whether it needs torch."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    needs_torch: bool = True


COMMANDS = (
    Command("demo", "run the shipped models beside eager and show what was rewritten", demo.add_arguments, demo.run),
    Command("doctor", "say what this machine has and what is missing", doctor.add_arguments, doctor.run, False),
    Command("explain", "report what is rewritten in a model, what is not and why", explain.add_arguments, explain.run),
    Command("generate", "stream one reply of a compiled model", generate.add_arguments, generate.run),
    Command("bench", "run the benchmark suite of a source tree", bench.add_arguments, bench.run),
    Command("calibrate", "measure accuracy against thinking tokens", calibrate.add_arguments, calibrate.run),
    Command("plan", "print the code that runs in place of a model's graph", plan.add_arguments, plan.run),
)

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="qwenopt", description="A torch.compile backend that runs Qwen3 near the limit of the hardware."
    )
    parser.add_argument("--version", action="version", version=f"qwenopt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        description = f"{command.summary[0].upper()}{command.summary[1:]}."
        sub = commands.add_parser(command.name, help=command.summary, description=description)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, needs_torch=command.needs_torch)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 fine, 1 a check failed, 2 bad input, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return BAD_INPUT
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        return _run(args)
    except QwenoptError as error:
        print(f"qwenopt {args.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(args: argparse.Namespace) -> int:
    if args.needs_torch:
        missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
        if missing:
            raise QwenoptError(f"needs {' and '.join(missing)}; add it by: pip install {' '.join(missing)}")
    if getattr(args, "threads", None) is not None:
        import torch

        torch.set_num_threads(args.threads)
    status: int = args.run(args)
    return status
