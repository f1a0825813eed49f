"""Raised nodes merged on a GPU: exactly those that belong together, nothing that is near; kernels of a decode step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qwenopt
from qwenopt import backend, graphs, report
from qwenopt.lowering import providers
from qwenopt.ops import KV_APPEND
from qwenopt.runtime.packed_batch import PackedBatch
from qwenopt.testing.fake_cuda import FakeGpu, Launches, allow_cuda_views, fake_gpu
from qwenopt.testing.models import build, full_config, tiny_model

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

LAYERS = 2
BF16 = torch.bfloat16


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    assert allow_cuda_views() is None
    with fake_gpu() as fake:
        yield fake


def captured(gpu: FakeGpu, call: Callable[..., Any], *args: Any) -> tuple[Any, Callable[[], Any]]:
    """What the backend makes of a call on the GPU, and a function that runs it."""
    report.clear()
    runs: list[Callable[[], Any]] = []

    def made(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        lowered = backend.compile_graph(gm, inputs)

        def run(*given: Any) -> Any:
            runs.append(lambda: lowered(*given))
            return lowered(*given)

        return run

    torch.compiler.reset()
    with gpu.mode:
        torch.compile(call, backend=made, fullgraph=True)(*args)
    (graph,) = qwenopt.last_report().graphs
    assert graph.lowering == "direct", graph.reason
    return graph, runs[0]


def packed_step(
    gpu: FakeGpu, plain: nn.Module, rows: int, kv_dtype: torch.dtype | None = None
) -> tuple[Any, Callable[[], Any]]:
    """A decode step of a paged cache."""
    model: Any = gpu.move(plain)
    with gpu.mode:
        sizes: dict[str, Any] = {"max_batch_size": rows, "num_pages": 8, "dtype": BF16, "kv_dtype": kv_dtype}
        batch = PackedBatch(qwenopt.PagedKVCache(model.config, **sizes, device="cuda:0"), rows, rows)
    places = batch.places

    def step() -> Tensor:
        how = {"position_ids": places.positions[None], "attention_mask": batch.masks(), "past_key_values": batch}
        hidden: Tensor = model.model(places.ids[None], **how).last_hidden_state
        return hidden

    return captured(gpu, step)


MOE = {"linear_group": 3 * LAYERS, "linear_add_rms_norm": 2 * LAYERS, "qk_norm_rope_append": 2 * LAYERS}
DENSE = {**MOE, "linear_silu_mul": 3 * LAYERS, "linear_add_rms_norm": 4 * LAYERS}


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=["plain", "int8"])
@pytest.mark.parametrize(("name", "merged"), [("0.6B", DENSE), ("4B", DENSE), ("30B-A3B", MOE)])
def test_a_paged_step_is_merged(gpu: FakeGpu, name: str, merged: dict[str, int], kv_dtype: torch.dtype | None) -> None:
    graph, _ = packed_step(gpu, tiny_model(name, BF16), 3, kv_dtype)
    assert graph.merged == merged
    assert graph.counts["linear"] == (7 if name != "30B-A3B" else 5) * LAYERS, "counts are of sites, merged or not"
    assert {site.provider for site in graph.sites} == {"triton"}
    assert graph.misses == []
    assert "merged qk_norm_rope_append 4" in graph.line()


LAYER = [
    "group_{}_kernel",
    "qk_norm_rope_append_kernel",
    "flat_kernel",
    "combine_kernel",
    "{}_kernel",
    "add_rms_norm_kernel",
    "gated_{}_kernel",
    "{}_kernel",
    "add_rms_norm_kernel",
]


@pytest.mark.parametrize("rows", [1, 8])
def test_a_dense_layer_of_a_paged_step_is_nine_kernels(gpu: FakeGpu, rows: int) -> None:
    """In the true size: there the products of o and down are cut, and nothing is started to add them up."""
    model = build(full_config("0.6B", num_hidden_layers=LAYERS, vocab_size=128), BF16)
    _, run = packed_step(gpu, model, rows)
    gpu.launched.clear()
    with gpu.mode, Launches(gpu):
        run()
    kernels = gpu.launched
    first = next(i for i, kernel in enumerate(kernels) if kernel.startswith("group_"))
    which = "gemv" if rows == 1 else "skinny"
    layer = [kernel.format(which) for kernel in LAYER]
    assert kernels[first:] == layer * LAYERS


def raised_and_merged(gpu: FakeGpu, call: Callable[..., Any], *args: Tensor) -> dict[str, int]:
    """Of a function that is no model: what is raised, by op, after merging."""
    found: list[list[str]] = []

    def made(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        ctx = graphs.raise_graph(gm)
        providers.choose(ctx.raised)
        found.append([r.op.name for r in graphs.merge_graph(gm, ctx.raised)])
        assert {r.node for r in ctx.raised} >= {n for n in gm.graph.nodes if n.target is KV_APPEND.default}
        return gm.forward

    torch.compiler.reset()
    with gpu.mode:
        torch.compile(call, backend=made, fullgraph=True)(*args)
    (names,) = found
    return {name: names.count(name) for name in dict.fromkeys(names)}


def tensors(gpu: FakeGpu, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [gpu.tensor(torch.empty(shape, dtype=BF16)) for shape in shapes]


def test_what_is_like_a_gated_product_and_is_not_one(gpu: FakeGpu) -> None:
    x, other, a, b, bias = tensors(gpu, (2, 16), (2, 16), (8, 16), (8, 16), (8,))

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.linear(x, a)) * F.linear(x, b)

    def of_two(x: Tensor, other: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.linear(x, a)) * F.linear(other, b)

    def with_bias(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.linear(x, a, bias)) * F.linear(x, b)

    def used_elsewhere(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        up = F.linear(x, b)
        return F.silu(F.linear(x, a)) * up, up

    def of_itself(x: Tensor, a: Tensor) -> Tensor:
        gate = F.linear(x, a)
        return F.silu(gate) * gate

    def written_between(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        gate = F.linear(x, a)
        x.mul_(2)
        return F.silu(gate) * F.linear(x, b)

    assert raised_and_merged(gpu, plain, x, a, b) == {"linear_silu_mul": 1}
    assert raised_and_merged(gpu, of_two, x, other, a, b) == {"silu_mul": 1, "linear": 2}
    assert raised_and_merged(gpu, with_bias, x, a, b, bias) == {"silu_mul": 1, "linear": 2}
    assert raised_and_merged(gpu, of_itself, x, a) == {"silu_mul": 1, "linear": 1}
    assert raised_and_merged(gpu, written_between, x, a, b) == {"silu_mul": 1, "linear": 2}
    # Two products of one x they still are.
    assert raised_and_merged(gpu, used_elsewhere, x, a, b) == {"silu_mul": 1, "linear_group": 1}


def test_what_is_like_a_group_and_is_not_one(gpu: FakeGpu) -> None:
    x, a, b, c, d, bias, square = tensors(gpu, (2, 16), (8, 16), (4, 16), (4, 16), (4, 16), (4,), (16, 16))

    def three(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, a), F.linear(x, b).sin(), F.linear(x, c)

    def four(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, a), F.linear(x, b), F.linear(x, c), F.linear(x, d)

    def one_with_bias(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, a), F.linear(x, b), F.linear(x, c, bias)

    def weight_made_later(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        first = F.linear(x, a)
        return F.linear(x, b * first.sum())

    def written_between(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first = F.linear(x, a)
        x.mul_(2)
        return first, F.linear(x, b)

    def weight_written_between(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first = F.linear(x, a)
        b.mul_(2)
        return first, F.linear(x, b)

    def in_a_row(x: Tensor, a: Tensor, square: Tensor) -> Tensor:
        return F.linear(F.linear(x, square), a)

    assert raised_and_merged(gpu, three, x, a, b, c) == {"linear_group": 1}
    assert raised_and_merged(gpu, four, x, a, b, c, d) == {"linear": 4}, "the kernel has up to three"
    assert raised_and_merged(gpu, one_with_bias, x, a, b, c, bias) == {"linear": 1, "linear_group": 1}
    assert raised_and_merged(gpu, weight_made_later, x, a, b) == {"linear": 2}
    assert raised_and_merged(gpu, written_between, x, a, b) == {"linear": 2}
    assert raised_and_merged(gpu, weight_written_between, x, a, b) == {"linear": 2}
    assert raised_and_merged(gpu, in_a_row, x, a, square) == {"linear": 2}


class Rope(nn.Module):
    """Norm, rotation and append of a layer, in the spelling of transformers. `after` says what follows."""

    def __init__(self, after: Callable[..., Any]) -> None:
        super().__init__()
        self.after = after

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> Any:
        def norm(x: Tensor) -> Tensor:
            wide = x.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (weight * wide.to(x.dtype)).transpose(1, 2)

        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

        def turn(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return (x * cos) + (torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin)

        return self.after(turn(norm(q)), turn(norm(k)), v, *rest)


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

    apart = {"qk_norm_rope": 1, "kv_append": 1}
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


def test_nothing_is_merged_on_the_cpu() -> None:
    report.clear()
    qwenopt.explain(tiny_model("0.6B"), torch.zeros(1, 4, dtype=torch.int64), options={"lowering": "direct"})
    (graph,) = qwenopt.last_report().graphs
    assert graph.merged == {}
    assert "merged" not in graph.line()


@pytest.mark.parametrize("name", sorted(DENSE))
def test_merges_can_be_disabled(gpu: FakeGpu, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_graph = backend.compile_graph
    monkeypatch.setattr(
        backend, "compile_graph", lambda gm, inputs: compile_graph(gm, inputs, options={"disable": [name]})
    )
    graph, _ = packed_step(gpu, tiny_model("0.6B", BF16), 3)
    assert name not in graph.merged
    assert set(graph.merged) >= set(DENSE) - {name, "linear_group"}
