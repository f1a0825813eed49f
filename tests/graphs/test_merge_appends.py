"""Rotations merged with the way of their keys into a cache on a GPU: exactly those, nothing that is near."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwenopt import graphs
from qwenopt.ops import KV_APPEND
from qwenopt.testing.fake_cuda import FakeGpu
from qwenopt.testing.merged import Rope, raised_and_merged, tensors


def test_what_is_like_an_append_and_is_not_one(gpu: FakeGpu) -> None:
    q, k, v, weight, cos, sin = tensors(gpu, (1, 3, 4, 8), (1, 3, 2, 8), (1, 2, 3, 8), (8,), (1, 3, 8), (1, 3, 8))
    pools, slots = tensors(gpu, *[(5, 2, 16, 8)] * 2), gpu.tensor(torch.empty(3, dtype=torch.int64))

    def merged(after: Callable[..., Any]) -> dict[str, int]:
        return raised_and_merged(gpu, Rope(after), q, k, v, weight, cos, sin, *pools, slots)

    def plain(q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> Any:
        KV_APPEND.default(k_pool, v_pool, None, None, k, v, slots)
        return q.sin()

    def keys_used(q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> Any:
        KV_APPEND.default(k_pool, v_pool, None, None, k, v, slots)
        return q.sin(), k.sin()

    def queries_before(q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> Any:
        out = q.sin()
        KV_APPEND.default(k_pool, v_pool, None, None, k, v, slots)
        return out

    def others_keys(q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> Any:
        KV_APPEND.default(k_pool, v_pool, None, None, k.sin(), v, slots)
        return q.sin()

    def queries_appended(q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> Any:
        KV_APPEND.default(k_pool, v_pool, None, None, q[:, :2], v, slots)
        return k.sin()

    def keys_given(q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> Any:
        KV_APPEND.default(k_pool, v_pool, None, None, v, v, slots)
        return q.sin(), k.sin()

    apart = {"qk_norm_rope": 1, "kv_append": 1}
    assert merged(keys_given) == apart
    assert merged(plain) == {"qk_norm_rope_append": 1}
    assert merged(keys_used) == apart
    assert merged(queries_before) == apart
    assert merged(others_keys) == apart
    assert merged(queries_appended) == apart


def test_inputs_of_the_rotation_written_before_the_append(gpu: FakeGpu) -> None:
    """The rotation would move past the write."""
    q, k, v, weight, cos, sin = tensors(gpu, (1, 3, 4, 8), (1, 3, 2, 8), (1, 2, 3, 8), (8,), (1, 3, 8), (1, 3, 8))
    pools, slots = tensors(gpu, *[(5, 2, 16, 8)] * 2), gpu.tensor(torch.empty(3, dtype=torch.int64))

    def after(q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor, weight: Tensor) -> Tensor:
        weight.mul_(2)
        KV_APPEND.default(k_pool, v_pool, None, None, k, v, slots)
        return q.sin()

    found = raised_and_merged(gpu, Rope(after), q, k, v, weight, cos, sin, *pools, slots, weight)
    assert found == {"qk_norm_rope": 1, "kv_append": 1}


def static_append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, length: Tensor) -> None:
    """As transformers' static cache does it, or nearly."""
    places = torch.arange(k.shape[2], device=k.device) + length
    length.add_(k.shape[2])
    keys.index_copy_(2, places, k)
    values.index_copy_(2, places, v)


def test_what_is_like_a_static_append_and_is_not_one(gpu: FakeGpu) -> None:
    q, k, v, weight, cos, sin = tensors(gpu, (1, 3, 4, 8), (1, 3, 2, 8), (1, 2, 3, 8), (8,), (1, 3, 8), (1, 3, 8))
    cache, length = tensors(gpu, *[(1, 2, 16, 8)] * 2), gpu.tensor(torch.tensor(0))

    def merged(after: Callable[..., Any]) -> dict[str, int]:
        return raised_and_merged(gpu, Rope(after), q, k, v, weight, cos, sin, *cache, length)

    def plain(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Any:
        static_append(keys, values, k, v, length)
        return q.sin(), keys.sin()

    def not_counted(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Any:
        places = torch.arange(3, device=k.device) + length
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places, v)
        return q.sin()

    def keys_used(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Any:
        static_append(keys, values, k, v, length)
        return q.sin(), k.sin()

    def length_read_between(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Any:
        places = torch.arange(3, device=k.device) + length
        length.add_(3)
        seen = length * 2
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places, v)
        return q.sin(), seen

    def keys_read_between(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Any:
        places = torch.arange(3, device=k.device) + length
        keys.index_copy_(2, places, k)
        seen = keys.sin()
        values.index_copy_(2, places, v)
        return q.sin(), seen

    def other_places(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Any:
        places = torch.arange(3, device=k.device) + length
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places + 1, v)
        return q.sin()

    def backwards(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Any:
        places = torch.arange(2, -1, -1, device=k.device) + length
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places, v)
        return q.sin()

    def places_used(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Any:
        places = torch.arange(3, device=k.device) + length
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places, v)
        return q.sin(), places

    whole = {"qk_norm_rope_static_append": 1}
    assert merged(plain) == whole
    assert merged(not_counted) == whole
    for near in (keys_used, length_read_between, keys_read_between, other_places, backwards, places_used):
        assert merged(near) == {"qk_norm_rope": 1}, near.__name__


def counted(gpu: FakeGpu, call: Callable[..., Any], *args: Tensor) -> list[str]:
    """How a function's counters are counted on after merging: names of the nodes that do it, in order."""
    found: list[str] = []

    def made(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        graphs.merge_graph(gm, [])
        names = [str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes]
        found.extend(name for name in names if name in ("add_", "_foreach_add_", "mul"))
        return gm.forward

    torch.compiler.reset()
    with gpu.mode:
        torch.compile(call, backend=made, fullgraph=True)(*args)
    return found


def test_counters_are_counted_on_in_one(gpu: FakeGpu) -> None:
    a, b, c = (gpu.tensor(torch.tensor(0)) for _ in range(3))

    def three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a.add_(1), b.add_(1), c.add_(1)
        return a * 2

    def read_between(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a.add_(1)
        seen = a * 2
        b.add_(1), c.add_(1)
        return seen

    def by_different_numbers(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a.add_(1), b.add_(2), c.add_(3)
        return a * 2

    def one_twice(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        a.add_(1), a.add_(1)
        return a * 2

    assert counted(gpu, three, a, b, c) == ["_foreach_add_", "mul"]
    assert counted(gpu, read_between, a, b, c) == ["add_", "mul", "_foreach_add_"]
    assert counted(gpu, by_different_numbers, a, b, c) == ["add_", "add_", "add_", "mul"]
    assert counted(gpu, one_twice, a, b, c) == ["add_", "add_", "mul"]
    on_cpu = [torch.tensor(0) for _ in range(3)]
    assert counted(gpu, three, *on_cpu) == ["add_", "add_", "add_", "mul"]
