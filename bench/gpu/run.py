"""Runs the parts of the GPU benchmark one after another, each in a process of its own and within its time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.machine import NO_GPU, describe, why_not
from bench.gpu.table import markdown

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
MODELS = ("8B", "30B-A3B", "0.6B", "4B")
PARTS = ("build", "tests", "ceilings", "kernels", "decode", "sanitizer")
# The most seconds of each part; of decode, for each model. What is left at the end is the sanitizer's.
SECONDS = {"build": 80, "tests": 70, "ceilings": 15, "kernels": 95, "decode": 62, "sanitizer": 60}


@dataclass(frozen=True)
class Command:
    """A process to run: what it is called in the results, and the most seconds for it."""

    name: str
    args: tuple[str, ...]
    seconds: float


def parse(args: Sequence[str]) -> argparse.Namespace:
    """The command line. Exits with 2, as argparse does, for an unknown part or model."""
    parser = argparse.ArgumentParser(prog="bench/gpu/run.sh", description=__doc__)
    parser.add_argument("--seconds", type=float, default=530.0, help="the most that all of it may take")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)}")
    parser.add_argument("--models", default=",".join(MODELS), help=f"models to decode, of {', '.join(MODELS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu")
    given = parser.parse_args(args)
    for name, known in (("only", PARTS), ("models", MODELS)):
        chosen = getattr(given, name).split(",")
        unknown = [one for one in chosen if one not in known]
        if unknown:
            parser.error(f"--{name}: {', '.join(unknown)}; known: {', '.join(known)}")
        setattr(given, name, chosen)
    return given


def commands(parts: Sequence[str], models: Sequence[str], out: Path) -> list[Command]:
    """What a run consists of."""
    setup = (sys.executable, "setup.py", "--quiet")
    module = (sys.executable, "-P", "-m")  # -P: the built copy comes before the sources in the working folder
    build = ("--build-lib", str(BUILD))
    native = ("build_ext", *build, "--build-temp", f"{BUILD}.objects")
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("*/test_gpu*.py"))
    tests = (*module, "pytest", "-q", "-m", "gpu", "--tb=line", "-p", "no:cacheprovider")
    sample = (*tests, "-x", "-k", "kv_append or budget_step or moe_align", "tests/cuda/test_gpu.py")
    found = [
        Command("copy", (*setup, "build_py", *build), 20),  # everything else imports the package from there
        Command("build", (*setup, *native), SECONDS["build"]),
        Command("tests", (*tests, *files), SECONDS["tests"]),
        Command("ceilings", (*module, "bench.gpu.ceilings", str(out)), SECONDS["ceilings"]),
        Command("kernels", (*module, "bench.gpu.kernels", str(out)), SECONDS["kernels"]),
        *(Command("decode", (*module, "bench.gpu.decode", str(out), model), SECONDS["decode"]) for model in models),
        Command("sanitizer", ("compute-sanitizer", "--error-exitcode=9", *sample), SECONDS["sanitizer"]),
    ]
    return [c for c in found if c.name == "copy" or c.name in parts]


def run(command: Command, seconds: float) -> dict[str, Any]:
    """Run one, for at most so many seconds; how it ended, and the end of what it said."""
    folders = [str(BUILD), str(ROOT / "bench"), str(ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}
    if command.name == "copy":
        env["QWENOPT_NO_NATIVE"] = "1"
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command.args, cwd=ROOT, env=env, timeout=seconds, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        code, said = str(done.returncode), done.stdout
    except OSError as error:  # compute-sanitizer comes with the CUDA toolkit, or does not
        code, said = "not started", str(error)
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        code, said = "out of time", text.decode(errors="replace") if isinstance(text, bytes) else text
    lines = [line for line in said.splitlines() if line.strip()]
    return {
        "part": command.name,
        "detail": command.args[-1] if command.name == "decode" else "",
        "ended": code,
        "seconds": round(time.perf_counter() - start, 1),
        "said": lines[-12:],
    }


def collect(out: Path, about: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Write what there is so far: one JSON with everything, one table."""
    results: dict[str, Any] = {"machine": about, "parts": parts}
    for path in sorted(out.glob("part-*.json")):
        results[path.stem.removeprefix("part-")] = json.loads(path.read_text())
    name = about["device"].replace(" ", "-").lower()
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(results))


def main(args: Sequence[str]) -> int:
    """Run it all; 3 where there is no GPU for it."""
    given = parse(args)
    reason = why_not()
    if reason is not None:
        print(f"bench/gpu/run.sh: {reason}", file=sys.stderr)
        return NO_GPU
    start = time.perf_counter()
    given.out.mkdir(parents=True, exist_ok=True)
    for old in given.out.glob("part-*.json"):
        old.unlink()
    parts: list[dict[str, Any]] = []
    about = describe()
    for command in commands(given.only, given.models, given.out):
        left = given.seconds - (time.perf_counter() - start)
        if left < 5:
            parts.append({"part": command.name, "ended": "no time left", "seconds": 0.0, "said": []})
        else:
            parts.append(run(command, min(left, command.seconds)))
        last = parts[-1]
        print(f"{last['part']} {last.get('detail', '')}: {last['ended']} after {last['seconds']} s", flush=True)
        if last["ended"] != "0":
            print("\n".join(last["said"]), flush=True)
        collect(given.out, about, parts)
    for part in given.out.glob("part-*.json"):
        part.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
