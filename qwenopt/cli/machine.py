"""Facts about this machine and what is installed on it; works without torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("qwenopt", "torch", "transformers", "triton", "numpy", "safetensors", "tokenizers")

# The instruction sets that the kernels are compiled for, best first, with the cpuid flags that each needs.
_BF16 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni")
ISAS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("amx", (*_BF16, "amx_tile", "amx_bf16")),
    ("avx512bf16", _BF16),
    ("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    ("avx2", ("avx2", "fma")),
)


def cpuinfo(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def cpu_model() -> str:
    """The processor's name."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def isa() -> str:
    """The best instruction set of `ISAS` that this processor has, else "generic"."""
    flags = set(cpuinfo("flags").split())
    return next((name for name, needed in ISAS if flags.issuperset(needed)), "generic")


def cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def memory_bytes() -> tuple[int, int]:
    """Memory of the machine and memory that is free for a new program; (0, 0) where it cannot be known."""
    values = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0, 0
    return values.get("MemTotal", 0), values.get("MemAvailable", 0)


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "qwenopt":
            from qwenopt import __version__

            return __version__
        return None


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Package -> installed version or None."""
    return {package: version(package) for package in packages}


def facts(threads: int | None = None) -> dict[str, Any]:
    """Machine, versions and date: the part that every JSON file of the commands has."""
    total, available = memory_bytes()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "isa": isa(),
        "cores": cores(),
        "threads": threads,
        "memory_bytes": total,
        "memory_available_bytes": available,
        "versions": versions(),
    }
