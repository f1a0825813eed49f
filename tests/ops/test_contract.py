"""What every op promises as a PyTorch operator: schema, fakes, dispatch with reasons, errors that carry the values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwenopt import native
from qwenopt.ops import OPS, SILU_MUL, Op
from qwenopt.ops.op import Provider
from qwenopt.testing.cases import CASES, case

# Ops that write to their arguments have no cases, since most tests of the cases run twice on the same arguments: they
# have tests of their own.
SAMPLES = {c.op: c for c in reversed(CASES)}
OVERLOADS = [(name, p.name) for name in SAMPLES for p in OPS[name].providers]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_overload_passes_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(OPS[name].default, SAMPLES[name].build(dtype))


@pytest.mark.parametrize(("name", "provider"), OVERLOADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_provider_overload_passes_opcheck(name: str, provider: str, dtype: torch.dtype) -> None:
    chosen = next(p for p in OPS[name].providers if p.name == provider)
    if (reason := chosen.available() if chosen.device == "cpu" else "tested where it runs") is not None:
        pytest.skip(f"{provider}: {reason}")
    torch.library.opcheck(chosen.overload, SAMPLES[name].build(dtype))


@pytest.mark.parametrize("name", OPS)
def test_ops_are_registered_under_their_name(name: str) -> None:
    assert OPS[name].name == name
    registered = getattr(torch.ops.qwenopt, name).default
    assert str(registered) == str(OPS[name].default) == f"qwenopt.{name}.default"
    assert registered._schema == OPS[name].default._schema


TABLE = torch.ones(1, 2, 8)
POOL = torch.ones(3, 2, 16, 8)
PAGED = (POOL, POOL, None, None, torch.zeros(1, 2, dtype=torch.int32))
BAD: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "rms_norm weight": ("rms_norm", (torch.ones(2, 8), torch.ones(4), 1e-6), r"rms_norm: x \(2, 8\) and weight \(4,\)"),
    "rms_norm matrix": ("rms_norm", (torch.ones(2, 8), torch.ones(1, 8), 1e-6), r"weight \(1, 8\).*must be \(8,\)"),
    "add_rms_norm shapes": (
        "add_rms_norm",
        (torch.ones(2, 8), torch.ones(3, 8), torch.ones(8), 1e-6),
        r"x \(2, 8\) and residual \(3, 8\)",
    ),
    "add_rms_norm weight": (
        "add_rms_norm",
        (torch.ones(2, 8), torch.ones(2, 8), torch.ones(9), 1e-6),
        r"x \(2, 8\) and weight \(9,\)",
    ),
    "silu_mul": ("silu_mul", (torch.ones(2, 3), torch.ones(2, 4)), r"gate \(2, 3\) and up \(2, 4\)"),
    "linear": ("linear", (torch.ones(2, 3), torch.ones(5, 4), None), r"x \(2, 3\) and weight \(5, 4\)"),
    "linear bias": ("linear", (torch.ones(2, 3), torch.ones(5, 3), torch.ones(4)), r"4"),
    "qk_norm_rope heads": (
        "qk_norm_rope",
        (torch.ones(1, 2, 4, 8), torch.ones(1, 2, 2, 6), *[torch.ones(8)] * 2, *[torch.ones(1, 2, 8)] * 2, 1e-6),
        r"q \(1, 2, 4, 8\) and k \(1, 2, 2, 6\)",
    ),
    "qk_norm_rope tables": (
        "qk_norm_rope",
        (torch.ones(1, 2, 4, 8), torch.ones(1, 2, 2, 8), *[torch.ones(8)] * 2, *[torch.ones(1, 2, 6)] * 2, 1e-6),
        r"cos \(1, 2, 6\).*head_dim 8",
    ),
    "qk_norm_rope positions": (
        "qk_norm_rope",
        (torch.ones(1, 4, 4, 8), torch.ones(1, 4, 2, 8), *[torch.ones(8)] * 2, *[torch.ones(1, 3, 8)] * 2, 1e-6),
        r"3",
    ),
    "qk_norm_rope batch": (
        "qk_norm_rope",
        (torch.ones(4, 2, 4, 8), torch.ones(4, 2, 2, 8), *[torch.ones(8)] * 2, *[torch.ones(3, 2, 8)] * 2, 1e-6),
        r"3",
    ),
    "qk_norm_rope weight": (
        "qk_norm_rope",
        (torch.ones(1, 2, 4, 8), torch.ones(1, 2, 2, 8), torch.ones(4), torch.ones(8), *[TABLE] * 2, 1e-6),
        r"weight \(4,\)",
    ),
    "attention heads": (
        "attention",
        (torch.ones(1, 5, 2, 8), *[torch.ones(1, 2, 3, 8)] * 2, None, None, False, 1.0),
        r"q \(1, 5, 2, 8\), k \(1, 2, 3, 8\)",
    ),
    "attention mask": (
        "attention",
        (torch.ones(1, 4, 2, 8), *[torch.ones(1, 2, 3, 8)] * 2, torch.ones(1, 1, 2, 5).bool(), None, False, 1.0),
        r"5",
    ),
    "attention positions": (
        "attention",
        (torch.ones(1, 4, 2, 8), *[torch.ones(1, 2, 3, 8)] * 2, None, torch.tensor([0, 1, 2, 3, 4]), False, 1.0),
        r"5",
    ),
    "kv_append pools": (
        "kv_append",
        (POOL, torch.ones(3, 2, 16, 9), None, None, *[torch.ones(1, 2, 4, 8)] * 2, torch.arange(4)),
        r"kv_append: k_pool \(3, 2, 16, 8\) torch.float32 and v_pool \(3, 2, 16, 9\)",
    ),
    "kv_append scales": (
        "kv_append",
        (*[POOL.to(torch.int8)] * 2, None, torch.ones(3, 2, 16), *[torch.ones(1, 2, 4, 8)] * 2, torch.arange(4)),
        r"kv_append: 1 scales for pools of torch.int8; int8 pools have two",
    ),
    "kv_append scale shape": (
        "kv_append",
        (*[POOL.to(torch.int8)] * 2, *[torch.ones(3, 2)] * 2, *[torch.ones(1, 2, 4, 8)] * 2, torch.arange(4)),
        r"kv_append: scale \(3, 2\) torch.float32; need \(pages, G, page_size\) = \(3, 2, 16\)",
    ),
    "kv_append keys": (
        "kv_append",
        (POOL, POOL, None, None, *[torch.ones(1, 3, 4, 8)] * 2, torch.arange(4)),
        r"kv_append: k \(1, 3, 4, 8\) and v \(1, 3, 4, 8\); need \(B, G, S, D\) twice with G = 2 and D = 8",
    ),
    "kv_append slots": (
        "kv_append",
        (POOL, POOL, None, None, *[torch.ones(1, 2, 4, 8)] * 2, torch.arange(5)),
        r"kv_append: slots \(5,\) torch.int64; need one torch.int64 for each token, \(4,\)",
    ),
    "kv_gather table": (
        "kv_gather",
        (POOL, POOL, None, None, torch.zeros(2, 2), True, torch.float32),
        r"kv_gather: block_table \(2, 2\) torch.float32; need \(rows, pages\) torch.int32",
    ),
    "paged_mask starts": (
        "paged_mask",
        (torch.zeros(2), torch.arange(3), 16, 0),
        r"paged_mask: q_starts \(2,\) torch.float32, q_positions \(3,\) torch.int64; need torch.int32",
    ),
    "paged_attention heads": (
        "paged_attention",
        (torch.ones(1, 5, 3, 8), *PAGED, None, None, None, 0, 1.0),
        r"paged_attention: q \(1, 5, 3, 8\) torch.float32 and pools \(3, 2, 16, 8\) torch.float32",
    ),
    "paged_attention dtype": (
        "paged_attention",
        (torch.ones(1, 4, 3, 8).bfloat16(), *PAGED, None, None, None, 0, 1.0),
        r"torch.bfloat16 and pools .* in one dtype \(or int8 pools\)",
    ),
    "paged_attention rows": (
        "paged_attention",
        (torch.ones(2, 4, 3, 8), *PAGED, None, None, None, 0, 1.0),
        r"paged_attention: 2 rows, but 1 in the block table",
    ),
    "paged_attention starts": (
        "paged_attention",
        (torch.ones(1, 4, 3, 8), *PAGED, torch.zeros(3).int(), torch.arange(3), None, 0, 1.0),
        r"paged_attention: q_starts \(3,\) torch.int32; need torch.int32 \(2,\) for 1 rows",
    ),
    "paged_attention packed": (
        "paged_attention",
        (torch.ones(1, 4, 3, 8), *PAGED, torch.tensor([0, 3]).int(), None, None, 0, 1.0),
        r"packed rows \(q_starts\) with 1 batch entries, no q_positions and no mask; they need 1, positions and no",
    ),
    "paged_attention positions": (
        "paged_attention",
        (torch.ones(1, 4, 3, 8), *PAGED, None, torch.arange(4), None, 0, 1.0),
        r"paged_attention: q_positions \(4,\) torch.int64; need torch.int64 \(3,\)",
    ),
    "paged_attention mask": (
        "paged_attention",
        (torch.ones(1, 4, 3, 8), *PAGED, None, None, torch.ones(1, 1, 3, 7).bool(), 0, 1.0),
        r"paged_attention: mask \(1, 1, 3, 7\); it must broadcast to .* = \(1, 4, 3, 32\)",
    ),
    "paged_attention window": (
        "paged_attention",
        (torch.ones(1, 4, 3, 8), *PAGED, None, None, None, -1, 1.0),
        r"paged_attention: window -1; need 0 \(none\) or more",
    ),
    "moe_route top_k": ("moe_route", (torch.ones(2, 4), 5, True), r"logits \(2, 4\), top_k 5"),
    "moe_route zero": ("moe_route", (torch.ones(2, 4), 0, True), r"top_k 0"),
    "top_tokens k": ("top_tokens", (torch.ones(2, 4), 5), r"top_tokens: logits \(2, 4\), k 5"),
    "top_tokens none": ("top_tokens", (torch.ones(2, 4), 0), r"top_tokens: logits \(2, 4\), k 0"),
    "top_tokens dtype": ("top_tokens", (torch.ones(2, 4).int(), 1), r"top_tokens: torch.int32 where a floating"),
    "logit_signals end": ("logit_signals", (torch.ones(2, 4), 4, True), r"logits \(2, 4\), end 4; .* 0 <= end < V"),
    "logit_signals rows": ("logit_signals", (torch.ones(4), 0, True), r"logit_signals: logits \(4,\), end 0"),
    "logit_signals dtype": ("logit_signals", (torch.ones(2, 4).int(), 0, True), r"torch.int32 where a floating"),
    "moe_experts shapes": (
        "moe_experts",
        (torch.ones(2, 8), torch.zeros(2, 1).long(), torch.ones(2, 1), torch.ones(4, 6, 8), torch.ones(4, 8, 4)),
        r"gate_up_proj \(4, 6, 8\), down_proj \(4, 8, 4\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("way", ["op", "torch.ops", "provider"])
def test_wrong_arguments_are_named(name: str, way: str) -> None:
    op, args, text = BAD[name]
    calls = [OPS[op]] if way == "op" else [OPS[op].default]
    if way == "provider":
        calls = [p.overload for p in OPS[op].providers if p.device == "cpu" and p.available() is None]
        if not calls:
            pytest.skip(f"{op} has no provider, or none is available: {native.why_not()}")
    for call in calls:
        with pytest.raises((RuntimeError, ValueError), match=text):
            call(*args)


@pytest.mark.parametrize("bad", [130, -1, 1 << 40])
@pytest.mark.parametrize("way", ["op", "reference"])
def test_expert_id_out_of_range_is_named(bad: int, way: str) -> None:
    args = list(case("moe_experts", "decode").build())
    args[3], args[4] = torch.ones(128, 8, 64), torch.ones(128, 64, 4)
    args[1][0, 2] = bad
    call = OPS["moe_experts"] if way == "op" else OPS["moe_experts"].reference
    with pytest.raises(IndexError, match=rf"expert id {bad} of 128 experts"):
        call(*args)


def test_choice_says_why_each_provider_was_passed_over() -> None:
    gate = torch.ones(2, 4, dtype=torch.float64)
    choice = SILU_MUL.choose((gate, gate))
    assert choice.provider is None
    wanted = "dtype torch.float64" if native.why_not() is None else str(native.why_not())
    assert f"cpu: {wanted}" in choice.reason


@pytest.mark.parametrize("name", [name for name in SAMPLES if any(p.device == "cpu" for p in OPS[name].providers)])
def test_ordinary_arguments_are_served_by_a_kernel(name: str) -> None:
    if native.why_not() is not None:
        pytest.skip(f"no native kernels: {native.why_not()}")
    for dtype in (torch.float32, torch.bfloat16):
        choice = OPS[name].choose(SAMPLES[name].build(dtype))
        assert choice.provider is not None, choice.reason


def test_mixed_dtypes_run_on_the_reference() -> None:
    x, weight = torch.randn(2, 8).bfloat16(), torch.rand(8)
    assert "mixed dtypes torch.bfloat16, torch.float32" in OPS["rms_norm"].choose((x, weight, 1e-6)).reason or (
        native.why_not() is not None
    )
    assert torch.equal(OPS["rms_norm"](x, weight, 1e-6), OPS["rms_norm"].reference(x, weight, 1e-6))


def test_device_without_a_provider_is_named() -> None:
    gate = torch.ones(2, 4, device="meta")
    assert SILU_MUL.choose((gate, gate)).reason == "no provider for device meta"


def double(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * by


def test_provider_with_other_parameters_is_refused() -> None:
    op = Op.__new__(Op)
    op.reference, op.fake, op.providers, op.name = double, None, [], "double"
    import inspect

    op.signature = inspect.signature(double)
    with pytest.raises(TypeError, match=r"double.cpu: the provider takes \(x\)"):
        op.provider("cpu", "cpu", available=lambda: None, accepts=lambda *a: None)(lambda x: x)


def test_first_provider_that_fits_is_chosen() -> None:
    def provider(name: str, device: str, reason: str | None) -> Provider:
        return Provider(name, device, lambda x, by: name, lambda: reason, lambda x, by: None, None)

    op = Op.__new__(Op)
    op.reference, op.fake, op.name = double, None, "double"
    op.providers = [provider("a", "cpu", "not here"), provider("b", "cuda", None), provider("c", "cpu", None)]
    assert op.choose((torch.ones(1), 2.0)).provider is op.providers[2]
    assert op(torch.ones(1), 2.0) == "c"
    op.providers.pop()
    assert op.choose((torch.ones(1), 2.0)).reason == "a: not here"
    assert torch.equal(op(torch.ones(1), 2.0), torch.full((1,), 2.0))
