"""`qwenopt doctor`: what this machine has, which kernels serve which op, and how to add what is missing."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from qwenopt.cli import console, machine
from qwenopt.cli.arguments import DTYPES

# The versions that pyproject.toml asks for: lowest allowed, first refused.
TORCH = ((2, 11), (2, 16))
TRANSFORMERS = ((5, 0), (5, 25))

OK, MISSING, BROKEN, NOT_NEEDED = "ok", "missing", "broken", "not needed here"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, how it stands, details, and the command that adds it."""

    name: str
    state: str
    detail: str
    fix: str = ""
    required: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings to this file")


def run(args: argparse.Namespace) -> int:
    """Print the findings; returns 1 where something is missing that everything else needs."""
    console.check_writable(args.json)
    facts = machine.facts(_threads())
    findings = examine()
    providers, why_none = _providers()
    print(f"qwenopt {facts['versions']['qwenopt']}, Python {facts['python']} on {facts['system']}")
    print(f"{facts['cpu']}: {facts['cores']} cores, {facts['memory_bytes'] / 1e9:.0f} GB, best ISA {facts['isa']}\n")
    for finding in findings:
        print(f"{finding.name:16} {finding.state:15} {finding.detail}")
        if finding.fix:
            print(f"{'':16} {'':15} -> {finding.fix}")
    print()
    if providers:
        rows = [[op, *(by_dtype[dtype]["provider"] for dtype in DTYPES)] for op, by_dtype in providers.items()]
        print(console.table(["op", *DTYPES], rows))
        reasons = {entry["reason"] for by_dtype in providers.values() for entry in by_dtype.values()}
        for reason in sorted(reasons - {""}):
            print(f"reference, because of {reason}")
    else:
        print(f"which kernels serve which op cannot be said: {why_none}")
    if args.json is not None:
        data = {"command": "doctor", "machine": facts, "findings": [asdict(f) for f in findings], "ops": providers}
        console.write_json(args.json, data)
    return 1 if any(f.required and f.state != OK for f in findings) else 0


def examine() -> list[Finding]:
    """Look at every part. A part that cannot even be looked at is a finding, too, never an error."""
    gpu = _gpu()
    parts: list[tuple[str, Callable[[], Finding]]] = [
        ("torch", lambda: _package("torch", TORCH, 'pip install "torch>=2.11,<2.16"')),
        ("transformers", lambda: _package("transformers", TRANSFORMERS, 'pip install "transformers>=5.0,<5.25"')),
        ("native kernels", _native),
        ("C++ compiler", _compiler),
        ("demo models", _demo_models),
        ("NVIDIA GPU", lambda: _gpu_finding(gpu)),
        ("torch with CUDA", lambda: _torch_cuda(gpu)),
        ("nvcc", lambda: _nvcc(gpu)),
        ("triton", lambda: _optional("triton", "pip install triton", gpu)),
        ("cupy", lambda: _cupy(gpu)),
        ("pytest", lambda: _optional("pytest-benchmark", "pip install pytest pytest-benchmark", "tests and bench")),
    ]
    return [_safely(name, part) for name, part in parts]


def _safely(name: str, part: Callable[[], Finding]) -> Finding:
    try:
        return part()
    except Exception as error:
        return Finding(name, BROKEN, f"{type(error).__name__}: {error}", "reinstall it; the text on the left says why")


def _package(name: str, allowed: tuple[tuple[int, int], tuple[int, int]], fix: str) -> Finding:
    """A package that everything needs: there, of a version we take, and importable."""
    version = machine.version(name)
    if version is None or find_spec(name) is None:
        return Finding(name, MISSING, "qwenopt does nothing without it", fix, required=True)
    minor = tuple(int(part) for part in version.split(".")[:2])
    if not allowed[0] <= minor < allowed[1]:
        low, high = (".".join(map(str, bound)) for bound in allowed)
        return Finding(name, BROKEN, f"{version}; needed: at least {low}, below {high}", fix, required=True)
    try:
        __import__(name)
    except Exception as error:
        return Finding(name, BROKEN, f"{version} cannot be imported: {error}", fix, required=True)
    return Finding(name, OK, version, required=True)


def _threads() -> int | None:
    try:
        import torch
    except Exception:
        return None
    return torch.get_num_threads()


def _native() -> Finding:
    from qwenopt import native

    reason = native.why_not()
    if reason is None:
        info: object = getattr(native.C(), "build_info", dict)()
        detail = ", ".join(f"{key} {value}" for key, value in info.items()) if isinstance(info, dict) else str(info)
        return Finding("native kernels", OK, detail)
    return Finding("native kernels", MISSING, f"{reason}; everything runs, on slower PyTorch references", _native_fix())


def _native_fix() -> str:
    import os

    if os.environ.get("QWENOPT_NO_NATIVE") == "1":
        return "unset QWENOPT_NO_NATIVE"
    root = Path(__file__).resolve().parents[2]
    install = f"pip install -e {root}" if (root / "setup.py").is_file() else "pip install --force-reinstall qwenopt"
    return install if _find_compiler() else f"{_compiler_fix()} && {install}"


def _find_compiler() -> str | None:
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def _compiler_fix() -> str:
    tools = (
        ("apt-get", "sudo apt-get install g++"),
        ("dnf", "sudo dnf install gcc-c++"),
        ("yum", "sudo yum install gcc-c++"),
        ("apk", "sudo apk add g++"),
        ("pacman", "sudo pacman -S gcc"),
        ("zypper", "sudo zypper install gcc-c++"),
        ("brew", "brew install gcc"),
    )
    return next((command for tool, command in tools if shutil.which(tool)), "install g++ or clang++")


def _compiler() -> Finding:
    path = _find_compiler()
    if path is None:
        return Finding("C++ compiler", MISSING, "builds the native kernels, and Inductor's code", _compiler_fix())
    return Finding("C++ compiler", OK, _first_line([path, "--version"]) or path)


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _demo_models() -> Finding:
    from qwenopt.cli import checkpoint
    from qwenopt.demo import DEMO_NAMES, demo_path
    from qwenopt.errors import CheckpointError

    for name in DEMO_NAMES:
        try:
            checkpoint.check(demo_path(name))
        except CheckpointError as error:
            return Finding("demo models", BROKEN, str(error), "pip install --force-reinstall qwenopt")
    return Finding("demo models", OK, ", ".join(DEMO_NAMES))


def _gpu() -> str:
    """Names and compute capabilities of NVIDIA GPUs, as the driver gives them; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    return _first_line(query) if shutil.which("nvidia-smi") else ""


def _gpu_finding(gpu: str) -> Finding:
    if gpu:
        return Finding("NVIDIA GPU", OK, gpu)
    return Finding("NVIDIA GPU", NOT_NEEDED, "no driver or no GPU (nvidia-smi); qwenopt runs on the CPU")


def _torch_cuda(gpu: str) -> Finding:
    fix = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
    try:
        import torch
    except ImportError:
        return Finding("torch with CUDA", MISSING if gpu else NOT_NEEDED, "torch is not installed", fix)
    if torch.version.cuda is None:
        return Finding("torch with CUDA", MISSING if gpu else NOT_NEEDED, f"torch {torch.__version__} is for CPUs", fix)
    if not torch.cuda.is_available():
        return Finding("torch with CUDA", BROKEN if gpu else NOT_NEEDED, f"CUDA {torch.version.cuda} finds no GPU")
    return Finding("torch with CUDA", OK, f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")


def _nvcc(gpu: str) -> Finding:
    path = shutil.which("nvcc")
    if path:
        return Finding("nvcc", OK, path)
    return Finding(
        "nvcc", MISSING if gpu else NOT_NEEDED, "compiles CUDA sources when the package is built",
        "install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads), or use cupy",
    )  # fmt: skip


def _cupy(gpu: str) -> Finding:
    for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy"):
        if machine.version(name) and find_spec("cupy"):
            return Finding("cupy", OK, f"{name} {machine.version(name)}")
    detail = "compiles CUDA sources at run time where there is no nvcc"
    return Finding("cupy", MISSING if gpu else NOT_NEEDED, detail, "pip install cupy-cuda13x")


def _optional(package: str, fix: str, wanted_by: str) -> Finding:
    version = machine.version(package)
    if version is not None:
        return Finding(package, OK, version)
    return Finding(package, MISSING if wanted_by else NOT_NEEDED, wanted_by or "for GPUs", fix)


def _providers() -> tuple[dict[str, dict[str, dict[str, str]]], str]:
    """Op -> dtype -> the provider that serves it and, for the reference, why no kernel does."""
    try:
        import torch

        from qwenopt.ops import OPS
        from qwenopt.testing import cases
    except Exception as error:
        return {}, str(error)
    table: dict[str, dict[str, dict[str, str]]] = {}
    for dtype in DTYPES:
        for name, op in OPS.items():
            examples = cases.cases(name)
            # Left out: what torch or the host does, what is the same for all dtypes, what only GPUs have kernels for.
            if not (examples and any(p.device == "cpu" for p in op.providers)):
                continue
            choice = op.choose(examples[0].build(getattr(torch, dtype)))
            provider = choice.provider.name if choice.provider else "reference"
            table.setdefault(name, {})[dtype] = {"provider": provider, "reason": choice.reason}
    return table, ""


def main() -> int:
    """Run the command alone: `python -m qwenopt.cli.doctor`."""
    parser = argparse.ArgumentParser(prog="qwenopt doctor")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
