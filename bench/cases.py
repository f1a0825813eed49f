"""What is measured: the ops at the shapes of published Qwen3 models, with the bytes and operations that each takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import cases_linear
import cases_paged
import torch
from torch import Tensor

from qwenopt.testing.models import SHAPES, Shape

BF16, F32 = torch.bfloat16, torch.float32
EPS = 1e-6

# Arguments that hold weights or cached keys are made several times over, until together they no longer fit a cache:
# in a model, too, each layer's come from memory.
ROTATE_BYTES = 256 << 20
MAX_VARIANTS = 24
NOISE_ELEMENTS = 1_000_003  # a prime, so that no two experts or rows come out the same


@dataclass(frozen=True)
class Work:
    """Arguments, of equal shapes, to be taken in turn; the least bytes to move and the operations of one call."""

    variants: list[tuple[Any, ...]]
    num_bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """An op at the shape of a published model; `tokens` are rows, or for attention queries."""

    op: str
    model: str
    tokens: int
    dtype: torch.dtype = BF16
    detail: str = ""
    ci: bool = False

    def build(self) -> Work:
        """Make the arguments, the same ones each time."""
        return _BUILDERS[self.op](SHAPES[self.model], self)

    def __str__(self) -> str:
        parts = [self.model, self.detail, f"T{self.tokens}", "bf16" if self.dtype == BF16 else "fp32"]
        return "-".join(part for part in parts if part)


@cache
def _pool() -> Tensor:
    return torch.randn(NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0))


def noise(case: Case, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal noise, repeated from a pool: a billion random numbers would take longer than the benchmark."""
    count = math.prod(shape)
    pool = (_pool() * scale).to(case.dtype)
    return pool.repeat(-(-count // NOISE_ELEMENTS))[:count].view(shape)


def norm_weight(case: Case, length: int) -> Tensor:
    """Weights of a norm, around one."""
    return noise(case, length, scale=0.1) + 1


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _rotated(make: Callable[[], tuple[Any, ...]], num_bytes: int) -> list[tuple[Any, ...]]:
    return [make() for _ in range(min(MAX_VARIANTS, max(1, ROTATE_BYTES // max(num_bytes, 1))))]


def _rms_norm(shape: Shape, case: Case) -> Work:
    x, weight = noise(case, 1, case.tokens, shape.hidden), norm_weight(case, shape.hidden)
    return Work([(x, weight, EPS)], 2 * _bytes(x) + _bytes(weight), 4 * x.numel())


def _add_rms_norm(shape: Shape, case: Case) -> Work:
    x, weight = noise(case, 1, case.tokens, shape.hidden), norm_weight(case, shape.hidden)
    return Work([(x, x * 0.5, weight, EPS)], 4 * _bytes(x) + _bytes(weight), 5 * x.numel())


def _qk_norm_rope(shape: Shape, case: Case) -> Work:
    dim = shape.head_dim
    q = noise(case, 1, case.tokens, shape.heads, dim)
    k = noise(case, 1, case.tokens, shape.kv_heads, dim)
    angle = torch.arange(case.tokens)[:, None] * 1e6 ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.cat((angle, angle), dim=-1)[None]
    cos, sin = angle.cos().to(case.dtype), angle.sin().to(case.dtype)
    args = (q, k, norm_weight(case, dim), norm_weight(case, dim), cos, sin, EPS)
    return Work([args], 2 * _bytes(q, k) + _bytes(cos, sin), 10 * (q.numel() + k.numel()))


def _attention(shape: Shape, case: Case) -> Work:
    """`detail` is the number of keys present, in a cache of twice that; without it, a causal prefill."""
    present = int(case.detail.removeprefix("L")) if case.detail else case.tokens
    length = 2 * present if case.detail else present
    dim, queries = shape.head_dim, case.tokens
    positions = torch.arange(present - queries, present) if case.detail else None

    def make() -> tuple[Any, ...]:
        q = noise(case, 1, queries, shape.heads, dim).transpose(1, 2)
        k, v = noise(case, 1, shape.kv_heads, length, dim), noise(case, 1, shape.kv_heads, length, dim, scale=0.5)
        return q, k, v, None, positions, positions is None, dim**-0.5

    kv_bytes = 2 * shape.kv_heads * present * dim * case.dtype.itemsize
    io_bytes = 2 * queries * shape.heads * dim * case.dtype.itemsize
    pairs = queries * present - queries * (queries - 1) // 2
    return Work(_rotated(make, 2 * kv_bytes), kv_bytes + io_bytes, 4 * pairs * shape.heads * dim)


def _silu_mul(shape: Shape, case: Case) -> Work:
    gate, up = noise(case, 1, case.tokens, shape.intermediate), noise(case, 1, case.tokens, shape.intermediate)
    return Work([(gate, up)], 3 * _bytes(gate), 5 * gate.numel())


def _moe_route(shape: Shape, case: Case) -> Work:
    # Random order instead of noise: ties would leave the choice of experts open.
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(shape.experts, generator=generator) for _ in range(case.tokens)]
    logits = (torch.stack(rows) / 16).to(case.dtype)
    out = case.tokens * shape.top_k * (case.dtype.itemsize + 8)
    return Work([(logits, shape.top_k, True)], _bytes(logits) + out, 5 * logits.numel())


def _moe_experts(shape: Shape, case: Case) -> Work:
    gate_up = noise(case, shape.experts, 2 * shape.moe_intermediate, shape.hidden, scale=shape.hidden**-0.5)
    down = noise(case, shape.experts, shape.hidden, shape.moe_intermediate, scale=shape.moe_intermediate**-0.5)
    generator = torch.Generator().manual_seed(2)
    touched, variants = [], []
    for _ in range(8):  # other experts each time; the weights as a whole are larger than any cache
        scores = torch.rand(case.tokens, shape.experts, generator=generator)
        indices = scores.argsort(-1)[:, : shape.top_k].contiguous()
        weights = torch.rand(case.tokens, shape.top_k, generator=generator)
        weights = (weights / weights.sum(-1, keepdim=True)).to(case.dtype)
        variants.append((noise(case, case.tokens, shape.hidden), indices, weights, gate_up, down))
        touched.append(indices.unique().numel())
    each = _bytes(gate_up[0], down[0])
    flops = 2 * case.tokens * shape.top_k * (gate_up[0].numel() + down[0].numel())
    io_bytes = 2 * _bytes(variants[0][0])
    return Work(variants, sum(touched) // len(touched) * each + io_bytes, flops)


def _qk_norm_rope_append(shape: Shape, case: Case) -> Work:
    """`detail` as of kv_append."""
    rope = _qk_norm_rope(shape, case)
    make, append_bytes, _ = cases_paged.kv_append(shape, case)
    (args,) = rope.variants
    *pools, _, v, slots = make()
    return Work([(*args, *pools, v, slots)], append_bytes + 2 * _bytes(args[0]) + _bytes(*args[4:6]), rope.flops)


def _qk_norm_rope_static_append(shape: Shape, case: Case) -> Work:
    """`detail` is the number of keys present, in a cache of twice that."""
    rope, present = _qk_norm_rope(shape, case), int(case.detail.removeprefix("L"))
    (args,) = rope.variants
    keys, values = (noise(case, 1, shape.kv_heads, 2 * present, shape.head_dim) for _ in range(2))
    v = noise(case, 1, case.tokens, shape.kv_heads, shape.head_dim).transpose(1, 2)
    num_bytes = 2 * _bytes(*args[:2], v) + _bytes(*args[4:6])
    return Work([(*args, keys, values, v, torch.tensor(present))], num_bytes, rope.flops)


def _rotating(build: Callable[[Shape, Case], tuple[Any, int, int]]) -> Callable[[Shape, Case], Work]:
    """`build` says how to make the arguments, and the bytes and operations of a call."""

    def work(shape: Shape, case: Case) -> Work:
        make, num_bytes, flops = build(shape, case)
        return Work(_rotated(make, num_bytes), num_bytes, flops)

    return work


_BUILDERS: dict[str, Callable[[Shape, Case], Work]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "qk_norm_rope": _qk_norm_rope,
    "attention": _attention,
    "kv_append": _rotating(cases_paged.kv_append),
    "paged_attention": _rotating(cases_paged.paged_attention),
    "silu_mul": _silu_mul,
    "moe_route": _moe_route,
    "moe_experts": _moe_experts,
    "linear": _rotating(cases_linear.linear),
    "linear_group": _rotating(cases_linear.linear_group),
    "linear_silu_mul": _rotating(cases_linear.linear_silu_mul),
    "linear_add_rms_norm": _rotating(cases_linear.linear_add_rms_norm),
    "linear_argmax": _rotating(cases_linear.linear_argmax),
    "qk_norm_rope_append": _qk_norm_rope_append,
    "qk_norm_rope_static_append": _qk_norm_rope_static_append,
}

CASES = [
    *(
        case
        for op in ("rms_norm", "add_rms_norm")
        for case in (
            Case(op, "0.6B", 1, ci=True),
            Case(op, "0.6B", 512, ci=True),
            Case(op, "0.6B", 512, F32),
            Case(op, "8B", 1),
            Case(op, "8B", 512),
        )
    ),
    Case("qk_norm_rope", "0.6B", 1, ci=True),
    Case("qk_norm_rope", "0.6B", 512, ci=True),
    Case("qk_norm_rope", "0.6B", 512, F32),
    Case("qk_norm_rope", "30B-A3B", 1),
    Case("qk_norm_rope", "30B-A3B", 512),
    Case("attention", "0.6B", 1, detail="L512", ci=True),
    *(Case("attention", "0.6B", 1, detail=d) for d in ("L4096", "L16384", "L32768")),
    Case("attention", "0.6B", 512, ci=True),
    Case("attention", "0.6B", 512, F32),
    *(Case("attention", "30B-A3B", 1, detail=d) for d in ("L4096", "L16384", "L32768")),
    Case("kv_append", "0.6B", 1, detail="1x1-p16", ci=True),
    *(Case("kv_append", "0.6B", t, detail=d) for t in (16, 512) for d in ("1x1-p16", "1x1-p256", "1x1-p16-int8")),
    Case("paged_attention", "0.6B", 4, detail="4x512-p16", ci=True),
    *(
        Case("paged_attention", "0.6B", tokens, detail=f"{rows}-{pages}")
        for tokens, rows in ((16, "16x2048"), (1, "1x32768"), (16, "ragged"))
        for pages in ("p16", "p64", "p256", "p16-int8")
    ),
    *(Case("paged_attention", "0.6B", 512, detail=f"1x4096-{pages}") for pages in ("p16", "p64", "p256", "p16-int8")),
    Case("silu_mul", "0.6B", 1, ci=True),
    Case("silu_mul", "0.6B", 512, ci=True),
    Case("silu_mul", "8B", 512),
    Case("moe_route", "30B-A3B", 1, ci=True),
    Case("moe_route", "30B-A3B", 64),
    Case("moe_route", "30B-A3B", 512),
    Case("moe_experts", "30B-A3B", 1, ci=True),
    Case("moe_experts", "30B-A3B", 8),
    Case("moe_experts", "30B-A3B", 64),
    Case("moe_experts", "30B-A3B", 512),
    Case("linear", "0.6B", 1, detail="gate_proj", ci=True),
    Case("linear", "0.6B", 1, F32, detail="gate_proj"),
    Case("linear", "0.6B", 8, detail="gate_proj"),
    Case("linear", "0.6B", 512, detail="gate_proj"),
    Case("linear", "0.6B", 1, detail="lm_head", ci=True),
    Case("linear", "8B", 1, detail="down_proj"),
    Case("linear", "8B", 8, detail="down_proj"),
]


def params(op: str) -> list[Any]:
    """The cases of one op as pytest parameters; those of the short subset carry its mark."""
    import pytest

    marks = {True: [pytest.mark.ci], False: []}
    return [pytest.param(case, id=str(case), marks=marks[case.ci]) for case in CASES if case.op == op]
