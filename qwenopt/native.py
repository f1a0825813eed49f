"""The native module `qwenopt._C`: whether it is there, why not, and what it can do. Only this file imports it."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

from qwenopt.errors import MissingNative

ISA_NAMES = ("generic", "avx2", "avx512", "avx512bf16", "amx")  # the codes of an `isa` argument; -1 is the best one
_BUILD_HINT = "run `pip install .` (or, for development, `python setup.py build_ext --inplace`) with a C++17 compiler"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The module, or the reason why there is none."""
    if os.environ.get("QWENOPT_NO_NATIVE") == "1":
        return None, "QWENOPT_NO_NATIVE=1 is set; unset it to use the native kernels"
    try:
        # First torch: its libgomp is then the one that _C finds by name, and the two share one pool of threads.
        import torch  # noqa: F401

        return importlib.import_module("qwenopt._C"), None
    except ModuleNotFoundError as error:
        if error.name == "qwenopt._C":
            return None, f"qwenopt._C was not built; {_BUILD_HINT}"
        return None, f"{error}; install it"
    except Exception as error:  # a module built for another machine fails in many ways: all of them mean "not there"
        return None, f"qwenopt._C does not load ({error}); {_BUILD_HINT}"


def available() -> bool:
    """Whether the native kernels can be used."""
    return _load()[0] is not None


def why_not() -> str | None:
    """Why the native kernels cannot be used, or None when they can."""
    return _load()[1]


def C() -> ModuleType:
    """Return the native module, or raise MissingNative with what to do."""
    module, reason = _load()
    if module is None:
        raise MissingNative(f"native: no native kernels: {reason}")
    return module


def build_info() -> dict[str, Any]:
    """What the native module was built with."""
    return dict(C().build_info())


def cpu_isa() -> str:
    """Name of the best instruction set that this host can run."""
    return ISA_NAMES[C().cpu_isa()]


def isas() -> list[str]:
    """Names of all instruction sets that are built in and that this host can run; their index is their code."""
    return list(ISA_NAMES[: C().cpu_isa() + 1])
