"""paged_attention of decoding, emulated: as accurate as eager, whatever the lengths, however the work is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt.ops.cuda import paged_attention as kernels
from qwenopt.ops.paged_attention import PAGED_ATTENTION
from qwenopt.testing.cases import Case, cases
from qwenopt.testing.emulated import Emulation
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.ragged import Ragged
from qwenopt.testing.tolerance import assert_as_accurate

BF16 = torch.bfloat16
ONE = Ragged((200,), (1,), heads=4, kv_heads=2, head_dim=64, dtype=BF16)
FEW = ONE.but(lengths=(37, 5, 300, 1, 16), queries=(1, 1, 1, 1, 1))
BATCHES = {
    "one": ONE,
    "few": FEW,
    **{f"groups {h}/{g}": ONE.but(heads=h, kv_heads=g) for h, g in ((4, 4), (5, 1), (8, 1), (10, 1), (16, 1))},
    "head_dim 128": FEW.but(head_dim=128, lengths=(37, 5, 140, 1, 16)),
    "pages of 64": FEW.but(page_size=64),
    "window": FEW.but(window=100),
    "window of one": FEW.but(window=1),
    "int8": FEW.but(int8=True),
    "int8 head_dim 128": ONE.but(int8=True, head_dim=128),
    "several queries": FEW.but(queries=(3, 1, 2, 0, 1), padding=2),
    "batch": ONE.but(lengths=(40, 40), queries=(1, 1), packed=False),
    "batch of several": ONE.but(lengths=(40, 40), queries=(3, 3), packed=False),
}


def run(emulation: Emulation, args: tuple[Any, ...], num_sms: int) -> Tensor:
    q, k, v, ks, vs, table, starts, positions, mask, window, scale = args
    assert kernels.accepts(*args) is None
    call = (num_sms, q, k, v, ks, vs, table, starts, positions, window, scale)
    found: Tensor = emulation.call(kernels.paged_attention, *call)
    return found


def check(emulation: Emulation, args: tuple[Any, ...], num_sms: int) -> Tensor:
    found = run(emulation, args, num_sms)
    q, k, v, *rest = args
    eager = PAGED_ATTENTION.reference(q, k.nan_to_num(), v.nan_to_num(), *rest)
    assert_as_accurate(found, eager, FORMULAS["paged_attention"](q, k.nan_to_num(), v.nan_to_num(), *rest))
    assert found.transpose(1, 2).is_contiguous()
    return found


@pytest.mark.parametrize("name", BATCHES)
def test_decode(emulation: Emulation, name: str) -> None:
    check(emulation, BATCHES[name].build(), 2)


def fits(case: Case) -> bool:
    return kernels.accepts(*case.build(BF16)) is None


@pytest.mark.parametrize("case", [c for c in cases("paged_attention") if fits(c)], ids=str)
def test_cases(emulation: Emulation, case: Case) -> None:
    check(emulation, case.build(BF16), 1)


@pytest.mark.parametrize("num_sms", [1, 4])
def test_pieces(emulation: Emulation, num_sms: int) -> None:
    """A long row beside short ones: in one piece, or shared out by the lengths on the device."""
    check(emulation, FEW.but(lengths=(1000, 3, 130, 129, 128), kv_heads=1).build(), num_sms)


def test_no_positions(emulation: Emulation) -> None:
    q, k, v, ks, vs, table, *_, scale = ONE.but(lengths=(48, 48), queries=(1, 1), packed=False).build()
    check(emulation, (q, k, v, ks, vs, table[:, :3], None, None, None, 7, scale), 2)


def test_a_query_that_sees_nothing_gives_zeros(emulation: Emulation) -> None:
    args = list(ONE.but(lengths=(20, 20), queries=(2, 2), packed=False).build())
    args[7] = torch.tensor([-1, 19])
    found = check(emulation, tuple(args), 2)
    assert not found[:, :, 0].any()


def test_the_neighbours_change_no_bit(emulation: Emulation) -> None:
    """In pieces of the least length a row is cut the same way, whatever stands beside it."""
    q, k, v, ks, vs, table, starts, positions, mask, window, scale = FEW.build()
    all_rows = run(emulation, (q, k, v, ks, vs, table, starts, positions, mask, window, scale), 8)
    one = (q[:, :, 2:3], k, v, ks, vs, table[2:3], torch.tensor([0, 1], dtype=torch.int32), positions[2:3])
    assert torch.equal(all_rows[:, :, 2:3], run(emulation, (*one, mask, window, scale), 8))


def test_strides(emulation: Emulation) -> None:
    """A part of a wider query, pools with heads beside tokens, as a layer's part of one tensor of all."""
    q, k, v, *rest = FEW.build()
    wide = torch.full((1, q.shape[2], 6, 64), torch.nan, dtype=BF16)
    wide[:, :, 1:5] = q.transpose(1, 2)
    pool = torch.stack((k, v), 1).transpose(2, 3).contiguous()  # [pages, keys or values, page_size, G, D]
    strided = (wide[:, :, 1:5].transpose(1, 2), pool[:, 0].transpose(1, 2), pool[:, 1].transpose(1, 2))
    plain = run(emulation, (q, k, v, *rest), 2)
    assert torch.equal(run(emulation, (*strided, *rest), 2), plain)
    odd = torch.cat((q.new_zeros(3), q.transpose(1, 2).flatten()))[3:].view(1, q.shape[2], 4, 64).transpose(1, 2)
    assert torch.equal(run(emulation, (odd, k, v, *rest), 2), plain)


def test_what_the_kernel_has_not_is_named() -> None:
    args = list(ONE.build())
    assert kernels.accepts(args[0].float(), *args[1:]) == "dtype torch.float32 (kernel: bfloat16)"
    for change, text in ((ONE.but(head_dim=72), "head_dim 72"), (ONE.but(page_size=8), "pages of 8"),
                         (ONE.but(heads=17, kv_heads=1), "17 query heads")):  # fmt: skip
        assert text in str(kernels.accepts(*change.build()))
    pool = torch.zeros(args[1].numel() + 1, dtype=BF16)[1:].view(args[1].shape)
    assert "offset 1 (kernel: multiples of 8)" in str(kernels.accepts(args[0], pool, *args[2:]))
    args[8] = torch.ones(1, 1, 1, 208, dtype=torch.bool)
    assert kernels.accepts(*args) == "a mask (kernel: positions)"
