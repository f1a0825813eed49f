"""Runs the parts of the GPU benchmark one after another, each in a process of its own and within its time."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.gpu.machine import NO_GPU, describe, why_not
from bench.gpu.table import markdown

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
MODELS = ("8B", "30B-A3B", "0.6B", "4B")
GRACE = 5.0  # seconds that an interrupted process has to say what it found
PARTS = ("build", "tests", "ceilings", "kernels", "decode", "sanitizer")
# The most seconds of each part; of decode, for each model. What is left at the end is the sanitizer's.
SECONDS = {"build": 80, "tests": 70, "ceilings": 15, "kernels": 95, "decode": 62, "sanitizer": 60}
# An argument that stands for the time after which no more is begun (time.time()), and the seconds left for the last.
UNTIL, LAST = "UNTIL", 15.0


@dataclass(frozen=True)
class Command:
    """A process to run: its part of the results and what of it, and the most seconds for it."""

    name: str
    args: tuple[str, ...]
    seconds: float
    detail: str = ""


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
    found_in = (path for path in sorted((ROOT / "tests").glob("*/test_*.py")) if "mark.gpu" in path.read_text())
    files = [str(path.relative_to(ROOT)) for path in found_in]
    tests = (*module, "pytest", "-q", "-m", "gpu", "--tb=line", "-p", "no:cacheprovider")
    sample = (*tests, "-x", "-k", "kv_append or budget_step or moe_align", "tests/cuda/test_gpu.py")
    found = [
        Command("copy", (*setup, "build_py", *build), 20),  # everything else imports the package from there
        Command("build", (*setup, *native), SECONDS["build"]),
        *(Command("tests", (*tests, file), SECONDS["tests"], file) for file in files),
        Command("ceilings", (*module, "bench.gpu.ceilings", str(out)), SECONDS["ceilings"]),
        Command("kernels", (*module, "bench.gpu.kernels", str(out), UNTIL), SECONDS["kernels"]),
        *(
            Command("decode", (*module, "bench.gpu.decode", str(out), model), SECONDS["decode"], model)
            for model in models
        ),
        Command("sanitizer", ("compute-sanitizer", "--error-exitcode=9", *sample), SECONDS["sanitizer"]),
    ]
    needed = {"copy", *parts}
    if needed & {"kernels", "decode"}:
        needed.add("ceilings")  # their shares are of these
    return [c for c in found if c.name in needed]


def stretched(found: Sequence[Command], seconds: float) -> list[Command]:
    """The same with longer limits where all of them together would not take `seconds`."""
    tests = max((c.seconds for c in found if c.name == "tests"), default=0.0)  # side by side
    factor = max(1.0, seconds / (sum(c.seconds for c in found if c.name != "tests") + tests))
    return [replace(c, seconds=c.seconds * factor) for c in found]


def run(command: Command, seconds: float) -> dict[str, Any]:
    """Run one, for at most so many seconds; how it ended, and the end of what it said."""
    folders = [str(BUILD), str(ROOT / "bench"), str(ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}
    if command.name == "copy":
        env["QWENOPT_NO_NATIVE"] = "1"
    start = time.perf_counter()
    until = f"{time.time() + seconds - LAST:.1f}"
    try:
        code, said = _ended([until if arg == UNTIL else arg for arg in command.args], env, seconds)
    except OSError as error:  # compute-sanitizer comes with the CUDA toolkit, or does not
        code, said = "not started", str(error)
    lines = [line for line in said.splitlines() if line.strip()]
    return {
        "part": command.name,
        "detail": command.detail,
        "ended": code,
        "seconds": round(time.perf_counter() - start, 1),
        "said": lines[-12:],
    }


def _ended(args: Sequence[str], env: dict[str, str], seconds: float) -> tuple[str, str]:
    """Exit code and output. What runs out of time is interrupted first: pytest then still says what it has found.

    A shell's background process ignores interrupts, and so would what it starts.
    """
    process = subprocess.Popen(
        args, cwd=ROOT, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
        return str(process.returncode), said
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        said, _ = process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    return "out of time", said


def collect(out: Path, about: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    """Write what there is so far: one JSON with everything, one table."""
    results: dict[str, Any] = {"machine": about, "parts": parts}
    for path in sorted(out.glob("part-*.json")):
        results[path.stem.removeprefix("part-")] = json.loads(path.read_text())
    name = about["device"].replace(" ", "-").lower()
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(results))


def _in_time(command: Command, start: float, seconds: float) -> dict[str, Any]:
    """Run a command if there is time left for it, and say how that went."""
    left = seconds - (time.perf_counter() - start)
    done: dict[str, Any] = {"part": command.name, "detail": command.detail, "ended": "no time left", "seconds": 0.0}
    if left > 2 * GRACE:
        done = run(command, min(left - GRACE, command.seconds))
    print(f"{done['part']} {done['detail']}: {done['ended']} after {done['seconds']} s", flush=True)
    if done["ended"] != "0":
        print("\n".join(done.get("said", [])), flush=True)
    return done


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
    wanted = stretched(commands(given.only, given.models, given.out), given.seconds)
    for name, group in groupby(wanted, lambda command: command.name):
        together = list(group)
        if name == "tests":  # most of their time is Triton's compiler, which has the other cores
            with ThreadPoolExecutor(len(together)) as pool:
                parts += pool.map(lambda command: _in_time(command, start, given.seconds), together)
            together = []
        for command in together:
            parts.append(_in_time(command, start, given.seconds))
            collect(given.out, about, parts)
        collect(given.out, about, parts)
    for part in given.out.glob("part-*.json"):
        part.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
