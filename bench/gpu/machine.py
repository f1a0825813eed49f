"""What the GPU benchmark runs on, and why it cannot, where it cannot. Needs nothing but torch."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from typing import Any

NO_GPU = 3  # exit code
MIN_CAPABILITY = (8, 0)
PACKAGES = ("torch", "triton", "transformers", "cupy-cuda13x", "numpy", "pybind11", "flashinfer-python")


def why_not() -> str | None:
    """Why this machine cannot be measured, or None."""
    need = "needs an NVIDIA GPU of compute capability 8.0 or newer"
    try:
        import torch
    except ImportError as error:
        return f"{need}, and torch: {error}"
    if torch.version.cuda is None:
        return f"{need}; torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"{need}; torch {torch.__version__} finds none ({_driver()})"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"{need}; {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    return None


def _driver() -> str:
    """What nvidia-smi says."""
    return _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "no nvidia-smi"


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return (done.stdout or done.stderr).strip()


def _commit() -> str:
    said = _said("git", "rev-parse", "--short", "HEAD")
    return "" if said.startswith("fatal") else said  # a copy without its history


def describe() -> dict[str, Any]:
    """Device, driver and versions: what a figure means nothing without."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    properties = torch.cuda.get_device_properties(0)
    nvcc = _said("nvcc", "--version").splitlines()
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "nvcc": nvcc[-1] if nvcc else "",
        "versions": versions,
        "commit": _commit(),
    }
