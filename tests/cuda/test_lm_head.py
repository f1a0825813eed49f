"""lm_head, emulated: the token that linear and argmax give, and the same logits where they are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenopt.ops.cuda import linear
from qwenopt.ops.cuda import lm_head as kernels
from qwenopt.testing.emulated import Emulation

BF16 = torch.bfloat16


def both(emulation: Emulation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids and logits of the kernel, after it was seen to leave its workspace as it was."""
    assert kernels.accepts(x, weight, bias) is None
    logits, space = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=BF16), kernels.workspace(x.device)
    ids = emulation.call(kernels.lm_head, x, weight, bias, logits, space)
    assert not space.any()
    assert torch.equal(emulation.call(kernels.lm_head, x, weight, bias, None, space), ids)
    return ids, logits


@pytest.mark.parametrize("blocks", [1024, 3])
@pytest.mark.parametrize(("rows", "n"), [(1, 16), (3, 100), (8, 7), (16, 130)], ids=str)
def test_the_first_of_the_largest(
    emulation: Emulation, monkeypatch: pytest.MonkeyPatch, rows: int, n: int, blocks: int
) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCKS", blocks)  # so that a block takes several tiles
    x, weight, bias = torch.randn(rows, 72).to(BF16), torch.randn(n, 72).to(BF16), torch.randn(n).to(BF16)
    ids, logits = both(emulation, x, weight, bias if rows == 3 else None)
    assert torch.equal(logits, emulation.call(linear.linear, x, weight, bias if rows == 3 else None))
    assert torch.equal(ids, logits.argmax(-1))


def test_equal_logits(emulation: Emulation) -> None:
    """Rows of the weight that are the same in different tiles, and zeros of both signs."""
    x, weight = torch.ones(2, 8).to(BF16), torch.full((40, 8), -1.0).to(BF16)
    weight[[37, 9, 20]] = 2.0
    assert both(emulation, x, weight)[0].tolist() == [9, 9]
    weight[:], weight[18], weight[3] = -1.0, 0.0, -1e-40
    ids, logits = both(emulation, 1e-3 * x, weight)
    assert logits[0, 3] == 0
    assert logits[0, 3].signbit()
    assert ids.tolist() == [3, 3]


def test_infinities_and_nan(emulation: Emulation) -> None:
    x, weight = torch.ones(1, 8).to(BF16), torch.full((40, 8), -torch.inf).to(BF16)
    assert both(emulation, x, weight)[0].tolist() == [0]
    weight[20], weight[30] = torch.inf, 1.0
    assert both(emulation, x, weight)[0].tolist() == [20]
    weight[33] = torch.nan
    assert both(emulation, x, weight)[0].tolist() == [33]


def test_what_the_kernel_has_not_is_named() -> None:
    x, weight = torch.randn(17, 16).to(BF16), torch.randn(8, 16).to(BF16)
    assert kernels.accepts(x, weight, None) == "17 rows (the kernel has 1 to 16)"
    assert "rows of 12" in str(kernels.accepts(x[:1, :12], weight[:, :12], None))
    assert "torch.float32" in str(kernels.accepts(x[:1].float(), weight.float(), None))
