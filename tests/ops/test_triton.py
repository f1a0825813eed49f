"""When the Triton providers step in and why not: decided from fake tensors, with no GPU and no Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt.ops import KV_APPEND, PAGED_ATTENTION, triton
from qwenopt.ops.triton import kv_append, paged_attention
from qwenopt.testing.ragged import Ragged

BATCH = Ragged((37, 5), (1, 1))


def attention(**changes: Any) -> tuple[Any, ...]:
    return BATCH.but(**changes).build()


def append(dtype: torch.dtype = torch.float32, pool: torch.dtype = torch.float32, dim: int = 64) -> tuple[Any, ...]:
    pools = [torch.zeros(3, 2, 16, dim, dtype=pool) for _ in range(2)]
    scales = [torch.zeros(3, 2, 16) if pool == torch.int8 else None for _ in range(2)]
    x = torch.zeros(1, 2, 4, dim, dtype=dtype)
    return (*pools, *scales, x, x, torch.zeros(4).long())


@pytest.mark.parametrize(
    ("why", "state"),
    [
        ("triton is not installed", {"_installed": lambda: False}),
        ("no CUDA device", {}),
        ("compute capability 7.5", {"is_available": lambda: True, "get_device_capability": lambda _: (7, 5)}),
        (None, {"is_available": lambda: True, "get_device_capability": lambda _: (8, 0)}),
    ],
)
def test_available_says_why_not(monkeypatch: pytest.MonkeyPatch, why: str | None, state: dict[str, Any]) -> None:
    monkeypatch.setattr(triton, "_installed", state.get("_installed", lambda: True))
    monkeypatch.setattr(torch.cuda, "is_available", state.get("is_available", lambda: False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", state.get("get_device_capability", lambda _: (0, 0)))
    reason = triton.available()
    assert reason is None if why is None else why in str(reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 32, "kv_heads": 2},
        {"head_dim": 256},
        {"head_dim": 72},
        {"int8": True},
        {"dtype": torch.bfloat16, "page_size": 256, "window": 5},
        {"packed": False, "lengths": (5, 5)},
    ],
    ids=str,
)
def test_attention_that_fits(changes: dict[str, Any]) -> None:
    assert paged_attention.accepts(*attention(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"heads": 34, "kv_heads": 2}, "17 query heads for each key/value head"),
        ({"head_dim": 288}, "head_dim 288"),
        ({"head_dim": 256, "int8": True}, "head_dim 256 of float32 over int8 pools"),
        ({"dtype": torch.float64}, "q has dtype torch.float64"),
    ],
)
def test_attention_that_does_not(changes: dict[str, Any], why: str) -> None:
    assert why in str(paged_attention.accepts(*attention(**changes)))


def test_layouts_that_do_not_fit_are_named() -> None:
    q, k, v, *rest = attention()
    assert "q has stride" in str(paged_attention.accepts(q.transpose(2, 3).contiguous().mT, k, v, *rest))
    other = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert "k_pool and v_pool have strides" in str(paged_attention.accepts(q, k, other, *rest))
    assert "tensors on several devices" in str(paged_attention.accepts(q.to("meta"), k, v, *rest))


def test_append() -> None:
    assert kv_append.accepts(*append()) is None
    assert kv_append.accepts(*append(torch.bfloat16, torch.int8, 72)) is None
    assert "k has dtype torch.float64" in str(kv_append.accepts(*append(torch.float64)))
    assert "k_pool has dtype torch.int16" in str(kv_append.accepts(*append(pool=torch.int16)))


@pytest.mark.parametrize("op", [KV_APPEND, PAGED_ATTENTION], ids=lambda op: op.name)
def test_registered_for_cuda(op: Any) -> None:
    provider = next(p for p in op.providers if p.name == "triton")
    assert provider.device == "cuda"
    assert str(provider.overload) == f"qwenopt.{op.name}.triton"
