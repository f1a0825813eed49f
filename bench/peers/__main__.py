"""`python -m bench.peers`: other programs beside this one, on the same random weights; see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.peers import driver, registry, table
from bench.peers.workloads import WORKLOADS
from qwenopt.cli import arguments, console
from qwenopt.testing import fullsize

RESULTS = Path(__file__).resolve().parents[1] / "results" / "peers"


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, which must be known; repeated ones count once."""
    known = list(known)

    def parse(text: str) -> list[str]:
        given = list(dict.fromkeys(text.split(",")))
        unknown = [name for name in given if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; known: {', '.join(known)}")
        return given

    return parse


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    made.add_argument("--size", choices=tuple(fullsize.SIZES), default="0.6b", help="which model")
    made.add_argument("--rounds", type=arguments.positive, default=6, help="alternating rounds")
    made.add_argument("--steps", type=arguments.positive, default=16, help="decode steps of each round")
    made.add_argument("--peers", type=names_of(registry.PEERS), metavar="A,B", help=", ".join(registry.PEERS))
    made.add_argument("--workloads", type=names_of(WORKLOADS), metavar="A,B", help=", ".join(WORKLOADS))
    made.add_argument("--no-install", action="store_true", help="run only what is installed, report the others")
    made.add_argument("--cold", action="store_true", help="empty the compile caches first")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON and Markdown files")
    arguments.add_threads(made)
    return made


def main() -> int:
    """Returns 1 where a contender failed; the files are written all the same."""
    import torch

    args = parser().parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    chosen = args.peers or list(registry.PEERS)
    settings = driver.Settings(
        size=args.size,
        names=list(dict.fromkeys([registry.OURS, *chosen])),
        loads=args.workloads or list(WORKLOADS),
        rounds=args.rounds,
        steps=args.steps,
        threads=torch.get_num_threads(),
        may_install=not args.no_install,
        cold=args.cold,
    )
    result = driver.run(settings)
    args.output.mkdir(parents=True, exist_ok=True)
    console.write_json(args.output / f"{args.size}.json", result)
    text = table.markdown(result)
    (args.output / f"{args.size}.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {args.output}")
    return 1 if any(entry["error"] for entry in result["peers"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
