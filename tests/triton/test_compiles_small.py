"""The small kernels compiled for compute capability 8.0 and 9.0, with no GPU: one launch, no spills, few registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwenopt.ops.triton.budget_guard import budget_guard
from qwenopt.ops.triton.budget_step import budget_step
from qwenopt.testing.budget_rows import random_rows
from qwenopt.testing.compiled import Kernel, compiled


def only(capability: int, call: Callable[..., Any], *args: Any) -> Kernel:
    """The one kernel that the call launches."""
    (kernel,) = compiled(capability, call, *args)
    assert f".target sm_{'90a' if capability == 90 else capability}" in kernel.ptx
    assert kernel.spill_bytes == 0, f"{kernel.spill_bytes} bytes spilled"
    return kernel


def test_budget_step_compiles(capability: int) -> None:
    kernel = only(capability, budget_step, *random_rows(0))
    assert kernel.registers <= 64  # 32 programs of a warp on a multiprocessor at once
    assert kernel.shared_bytes == 0
    assert kernel.num_warps == 1, "threads of another warp would read what the first one has written"
    assert "bra" not in kernel.ptx.replace(".debug_abbrev", ""), "rows take different ways; a warp takes one"
    assert "fma" not in kernel.ptx, "a fused multiplication rounds once, the reference twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_budget_guard_compiles(dtype: torch.dtype, capability: int) -> None:
    _, _, state, _, _, ids = random_rows(0)
    kernel = only(capability, budget_guard, torch.zeros(len(state), 50, dtype=dtype), state, ids)
    assert kernel.registers <= 64
    assert kernel.shared_bytes == 0
    assert "fma" not in kernel.ptx
    assert "div.rn.f32" in kernel.ptx
