"""Arguments in a mapped safetensors file, two bytes past any alignment: the numbers of aligned ones, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops import OPS
from qwenopt.testing import unaligned
from qwenopt.testing.cases import CASES, Case

FLOATS = ("linear", "moe_experts", "rms_norm", "add_rms_norm", "silu_mul", "qk_norm_rope")
# The product of many rows is a library's, whose bits may depend on addresses.
MAPPED = [c for c in CASES if c.op in FLOATS and c.name != "rows past the kernel"]


def mapped(path: Path, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args` with its floating point tensors, in their order, from a mapped file."""
    names = {i: str(i) for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and a.numel()}
    unaligned.save(path, {name: args[i] for i, name in names.items()})
    loaded = unaligned.load(path)
    assert loaded[min(loaded)].data_ptr() % 4 == 2
    return tuple(loaded[names[i]] if i in names else a for i, a in enumerate(args))


@pytest.mark.parametrize("case", MAPPED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unaligned_arguments_give_the_same_bits(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    args = case.build(dtype)
    if not any(isinstance(a, Tensor) and a.is_floating_point() and a.numel() for a in args):
        pytest.skip("nothing to map")
    op = OPS[case.op]
    found, wanted = op(*mapped(tmp_path / "args.safetensors", args)), op(*args)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
