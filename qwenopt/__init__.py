"""qwenopt: a drop-in `torch.compile` backend for Qwen3.

Importing this package is cheap: no torch, no transformers, no GPU. The public names load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenopt.api import compile, explain
    from qwenopt.demo.load import demo_model
    from qwenopt.report import Report, last_report
    from qwenopt.runtime.continuous_batching import use_continuous_batching
    from qwenopt.runtime.generate import generate
    from qwenopt.runtime.hf_generate import hf_generate
    from qwenopt.runtime.paged_cache import PagedKVCache
    from qwenopt.runtime.thinking import ThinkingConfig, ThinkingStats
    from qwenopt.runtime.thinking_probe import ThinkingProbe

__version__ = "0.1.0"

__all__ = [
    "PagedKVCache",
    "Report",
    "ThinkingConfig",
    "ThinkingProbe",
    "ThinkingStats",
    "__version__",
    "compile",
    "demo_model",
    "explain",
    "generate",
    "hf_generate",
    "last_report",
    "use_continuous_batching",
]

# Public name -> the module that defines it.
_HOME = {
    "PagedKVCache": "qwenopt.runtime.paged_cache",
    "Report": "qwenopt.report",
    "ThinkingConfig": "qwenopt.runtime.thinking",
    "ThinkingProbe": "qwenopt.runtime.thinking_probe",
    "ThinkingStats": "qwenopt.runtime.thinking",
    "compile": "qwenopt.api",
    "demo_model": "qwenopt.demo.load",
    "explain": "qwenopt.api",
    "generate": "qwenopt.runtime.generate",
    "hf_generate": "qwenopt.runtime.hf_generate",
    "last_report": "qwenopt.report",
    "use_continuous_batching": "qwenopt.runtime.continuous_batching",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module; an unknown one raises with the nearest that exists."""
    if name in _HOME:
        from importlib import import_module

        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    message = f"module 'qwenopt' has no attribute {name!r}"
    if not name.startswith("_"):
        from difflib import get_close_matches

        nearest = get_close_matches(name, _HOME, n=1)
        message += f"; did you mean {nearest[0]!r}?" if nearest else f"; it has {', '.join(sorted(_HOME))}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
