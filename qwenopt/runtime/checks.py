"""What numbers and dtypes a cache and a generation take."""

from __future__ import annotations

from typing import Any

import torch

from qwenopt.errors import QwenoptError


def check_whole(what: str, **values: Any) -> None:
    """Raise QwenoptError unless each of `values` is a whole number of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise QwenoptError(f"{what}: {name}={value!r}; need a whole number of at least 1")


def text_config(config: Any) -> Any:
    """The config of the decoder; raises QwenoptError for what is no config."""
    if not hasattr(config, "get_text_config"):
        raise QwenoptError(f"PagedKVCache: config {type(config).__name__}; need a model's config, as model.config")
    return config.get_text_config(decoder=True)


def model_dtype(config: Any, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the model that a cache is for; raises QwenoptError for one that caches do not take."""
    found = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise QwenoptError(f"PagedKVCache: dtype {found}; need torch.float32, torch.bfloat16 or torch.float16")
    return found


def pool_dtype(dtype: torch.dtype, kv_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the pools of a model of that dtype; raises QwenoptError for one that they cannot have."""
    if kv_dtype not in (None, dtype, torch.int8):
        raise QwenoptError(f"PagedKVCache: kv_dtype {kv_dtype}; need torch.int8, or {dtype}, the model's")
    return kv_dtype or dtype
