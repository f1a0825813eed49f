"""`qwenopt bench`: the benchmark suite of a source tree."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from qwenopt.errors import QwenoptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--ci", action="store_true", help="only the short subset")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write pytest-benchmark's JSON to this file")
    parser.add_argument("--folder", type=Path, help="the bench folder (default: found from here or from the package)")
    parser.add_argument("pytest_args", nargs="*", metavar="-- ARGS", help="further arguments for pytest, after --")


def find_bench(given: Path | None) -> Path:
    """The bench folder: the given one, or that of the source tree we are in. Raises QwenoptError where none is."""
    here = Path.cwd()
    package = Path(__file__).resolve().parents[2]
    candidates = [given] if given is not None else [folder / "bench" for folder in (here, *here.parents, package)]
    for folder in candidates:
        if (folder / "pytest.ini").is_file() and (folder / "bench_generate.py").is_file():
            return folder
    where = f"{given} is not one" if given is not None else "an installed package has none"
    raise QwenoptError(f"needs the bench folder of qwenopt's source tree, and {where}; run it in a source tree")


def run(args: argparse.Namespace) -> int:
    """Run pytest on the bench folder; returns its exit status."""
    folder = find_bench(args.folder)
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise QwenoptError(f"needs {' and '.join(missing)}; add them by: pip install pytest pytest-benchmark")
    command = [sys.executable, "-m", "pytest", str(folder), "-c", str(folder / "pytest.ini")]
    command += ["-m", "ci"] if args.ci else []
    command += [f"--benchmark-json={args.json}"] if args.json else []
    return subprocess.run(command + args.pytest_args, check=False).returncode
