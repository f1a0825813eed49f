"""Tolerances that are derived, not typed: as accurate as eager, measured against a float64 truth."""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(truth: Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of `dtype` at the largest magnitude of `truth` (at least the smallest normal)."""
    largest = truth.abs().max().item() if truth.numel() else 0.0
    info = torch.finfo(dtype)
    return max(largest, info.tiny) * info.eps


def error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from the truth; NaN where one has it and the other has not counts as infinite."""
    if not value.numel():
        return 0.0
    value, truth = value.double(), truth.double()
    if not torch.equal(value.isnan(), truth.isnan()):
        return float("inf")
    return (value - truth).nan_to_num(0.0).abs().max().item()


def assert_as_accurate(actual: Tensor, eager: Tensor, truth: Tensor, *, slack: float = 2.0) -> None:
    """No further from the float64 `truth` than `slack` times eager is in the same dtype, plus one ulp."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, the truth has {tuple(truth.shape)}"
    assert actual.dtype == eager.dtype, f"dtype {actual.dtype}, eager gives {eager.dtype}"
    found, allowed = error(actual, truth), slack * error(eager, truth) + ulp(truth, eager.dtype)
    assert found <= allowed, (
        f"error {found:.3g} against float64; {allowed:.3g} allowed, eager {error(eager, truth):.3g}"
    )


def assert_near_eager(found: Tensor, eager: Tensor, *, num_layers: int = 2) -> None:
    """Logits of one model computed in two orders: apart by rounding alone.

    Some 16 rounded steps lie one behind another in a layer (two norms, four products with their sums, rotation,
    softmax, gate, two residual sums), each good for one epsilon of the largest value.
    """
    bound = 16 * num_layers * ulp(eager, eager.dtype)
    assert found.dtype == eager.dtype, f"dtype {found.dtype}, eager gives {eager.dtype}"
    apart = error(found, eager)
    assert apart <= bound, f"{apart:.3g} from eager; rounding explains {bound:.3g}"
