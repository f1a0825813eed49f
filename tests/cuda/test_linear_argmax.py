"""linear_argmax, emulated: the token that linear and argmax give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenopt.ops.cuda import linear
from qwenopt.ops.cuda import linear_argmax as kernels
from qwenopt.ops.cuda.launch import Launch
from qwenopt.ops.linear_argmax import LINEAR_ARGMAX
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.emulated import Emulation

BF16 = torch.bfloat16


def ids_of(emulation: Emulation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    assert kernels.accepts(x, weight, bias) is None
    found: Tensor = emulation.call(kernels.linear_argmax, x, weight, bias)
    return found


@pytest.mark.parametrize("case", cases("linear_argmax"), ids=str)
def test_the_cases_of_all_providers(emulation: Emulation, case: Case) -> None:
    args = case.build(BF16)
    assert torch.equal(ids_of(emulation, *args), LINEAR_ARGMAX.reference(*args))


@pytest.mark.parametrize("blocks", [1024, 3])
@pytest.mark.parametrize(("rows", "n"), [(1, 16), (3, 100), (8, 7), (16, 130)], ids=str)
def test_the_first_of_the_largest(
    emulation: Emulation, monkeypatch: pytest.MonkeyPatch, rows: int, n: int, blocks: int
) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCKS", blocks)  # so that a block takes several tiles
    x, weight, bias = torch.randn(rows, 72).to(BF16), torch.randn(n, 72).to(BF16), torch.randn(n).to(BF16)
    args = (x, weight, bias if rows == 3 else None)
    logits = emulation.call(linear.linear, *args)
    assert torch.equal(ids_of(emulation, *args), logits.argmax(-1, keepdim=True))


def test_equal_logits(emulation: Emulation) -> None:
    """Rows of the weight that are the same in different tiles, and zeros of both signs."""
    x, weight = torch.ones(2, 8).to(BF16), torch.full((40, 8), -1.0).to(BF16)
    weight[[37, 9, 20]] = 2.0
    assert ids_of(emulation, x, weight).tolist() == [[9], [9]]
    weight[:], weight[18], weight[3] = -1.0, 0.0, -1e-40
    logits = emulation.call(linear.linear, 1e-3 * x, weight, None)
    assert logits[0, 3] == 0
    assert logits[0, 3].signbit()
    assert ids_of(emulation, 1e-3 * x, weight).tolist() == [[3], [3]]


def test_infinities_and_nan(emulation: Emulation) -> None:
    x, weight = torch.ones(1, 8).to(BF16), torch.full((40, 8), -torch.inf).to(BF16)
    assert ids_of(emulation, x, weight).tolist() == [[0]]
    weight[20], weight[30] = torch.inf, 1.0
    assert ids_of(emulation, x, weight).tolist() == [[20]]
    weight[33] = torch.nan
    assert ids_of(emulation, x, weight).tolist() == [[33]]


@pytest.mark.parametrize(("rows", "k"), [(17, 16), (2, 12)], ids=str)
def test_what_the_kernel_has_not_is_chosen_from_logits(emulation: Emulation, rows: int, k: int) -> None:
    x, weight = torch.randint(-1, 2, (rows, k)).to(BF16), torch.randint(-2, 3, (40, k)).to(BF16)
    launched: list[Launch] = []

    def run(launch: Launch) -> None:
        launched.append(launch)
        emulation.run(launch)

    assert torch.equal(kernels.linear_argmax(run, x, weight, None), LINEAR_ARGMAX.reference(x, weight, None))
    assert not any("argmax" in launch.kernel for launch in launched)
    assert kernels.accepts(x.float(), weight.float(), None) == "torch.float32 (the kernel has bfloat16)"
