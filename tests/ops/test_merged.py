"""Ops that others are merged to: what they promise as operators, and that they are the others one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import KV_APPEND, OPS, QK_NORM_ROPE
from qwenopt.testing.cases import case

ROPE = case("qk_norm_rope", "prefill")


def arguments(name: str) -> tuple[Any, ...]:
    rope = ROPE.build()
    batch, seq, groups, dim = rope[1].shape
    v = torch.randn(batch, seq, groups, dim).transpose(1, 2)
    if name == "qk_norm_rope_append":
        pools = [torch.zeros(3, groups, 16, dim) for _ in range(2)]
        return (*rope, *pools, None, None, v, torch.randperm(48)[: batch * seq])
    return (*rope, *(torch.zeros(batch, groups, 20, dim) for _ in range(2)), v, torch.tensor(4))


@pytest.mark.parametrize("name", ["qk_norm_rope_append", "qk_norm_rope_static_append"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(OPS[name].default, arguments(name))


def test_paged() -> None:
    *rope, k_pool, v_pool, _, _, v, slots = arguments("qk_norm_rope_append")
    pools = [k_pool.clone(), v_pool.clone()]
    q, k = QK_NORM_ROPE.reference(*rope)
    KV_APPEND.reference(*pools, None, None, k, v, slots)
    assert torch.equal(OPS["qk_norm_rope_append"](*rope, k_pool, v_pool, None, None, v, slots), q)
    assert torch.equal(k_pool, pools[0])
    assert torch.equal(v_pool, pools[1])


def test_static() -> None:
    *rope, keys, values, v, length = arguments("qk_norm_rope_static_append")
    q, k = QK_NORM_ROPE.reference(*rope)
    assert torch.equal(OPS["qk_norm_rope_static_append"](*rope, keys, values, v, length), q)
    assert torch.equal(keys[:, :, 4:9], k)
    assert torch.equal(values[:, :, 4:9], v)
    assert not keys[:, :, :4].any()
    assert not keys[:, :, 9:].any()


def without(args: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*args[:index], value, *args[index + 1 :])


X, W = torch.ones(2, 3), torch.ones(5, 3)
BAD: dict[str, tuple[str, Any, str]] = {
    "no weights": ("linear_group", (X, []), "linear_group: no weights"),
    "one weight of another width": (
        "linear_group",
        (X, [W, torch.ones(5, 4)]),
        r"linear_group: x \(2, 3\) and weight \(5, 4\)",
    ),
    "bias": (
        "linear_argmax",
        (X, W, torch.ones(4)),
        r"linear_argmax: bias \(4,\) for weight \(5, 3\); it must be \(5,\)",
    ),
    "no columns": ("linear_argmax", (X, W[:0], None), r"weight \(0, 3\); it must have 1 to"),
    "gate and up": (
        "linear_silu_mul",
        (X, W, torch.ones(4, 3)),
        r"gate_weight \(5, 3\) and up_weight \(4, 3\) must have one shape",
    ),
    "residual": (
        "linear_add_rms_norm",
        (X, W, torch.ones(2, 4), torch.ones(4), 1e-6),
        r"residual \(2, 4\) for x \(2, 3\) and weight \(5, 3\); it must be \(2, 5\)",
    ),
    "norm weight": ("linear_add_rms_norm", (X, W, torch.ones(2, 5), torch.ones(4), 1e-6), r"weight must be \(5,\)"),
    "slots": ("qk_norm_rope_append", (12, torch.zeros(3, dtype=torch.int64)), r"kv_append: slots \(3,\)"),
    "static cache of other heads": (
        "qk_norm_rope_static_append",
        (7, torch.zeros(2, 3, 20, 64)),
        r"keys \(2, 3, 20, 64\).*need \(2, 2, L, 64\)",
    ),
    "static cache of another dtype": (
        "qk_norm_rope_static_append",
        (8, torch.zeros(2, 2, 20, 64).double()),
        r"values \(2, 2, 20, 64\) torch.float64",
    ),
    "values": ("qk_norm_rope_static_append", (9, torch.zeros(2, 2, 3, 64)), r"v \(2, 2, 3, 64\); need \(2, 2, 5, 64\)"),
    "length": ("qk_norm_rope_static_append", (10, torch.zeros(1).long()), r"length \(1,\) torch.int64; need one"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad: str) -> None:
    name, args, message = BAD[bad]
    given = args if isinstance(args[0], Tensor) else without(arguments(name), *args)
    with pytest.raises(RuntimeError, match=message):
        OPS[name](*given)
    with pytest.raises(RuntimeError, match=message):
        OPS[name].default(*given)
