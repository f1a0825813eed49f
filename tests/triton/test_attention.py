"""attention over keys that lie in one piece, by the kernels of paged_attention, interpreted, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenopt.ops.attention import attention as reference
from qwenopt.testing.cases import Case, cases, qkv
from qwenopt.testing.interpreted import Run
from qwenopt.testing.tolerance import assert_as_accurate

FEW, MANY = (2, 8), (16, 9)  # multiprocessors (few: prefill fills them) and major compute capability
DEVICES = pytest.mark.parametrize("device", [FEW, MANY], ids=["few", "many"])
HALF, FP32 = torch.float16, torch.float32


def build(
    sizes: tuple[int, ...],
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    causal: bool = False,
    dtype: torch.dtype = HALF,
) -> tuple[Any, ...]:
    """Arguments for sizes (B, H, G, S, L, D)."""
    q, k, v = (t.to(dtype) for t in qkv(*sizes))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    return q, k, v, mask, positions, causal, sizes[-1] ** -0.5


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def check(run: Run, args: tuple[Any, ...], device: tuple[int, int]) -> Tensor:
    found, after = run("attention.planned_attention", device, *args)
    assert_as_accurate(found, reference(*args), reference(*in_float64(args)))
    assert found.transpose(1, 2).is_contiguous()
    for a, b in zip(args, after[1:], strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("case", cases("attention"), ids=str)
def test_the_cases_of_all_providers(run: Run, case: Case) -> None:
    check(run, case.build(FP32), MANY)


@DEVICES
@pytest.mark.parametrize("positions", [None, [199], [3]], ids=str)
def test_decode_shares_out_the_keys_of_a_row(run: Run, positions: list[int] | None, device: tuple[int, int]) -> None:
    at = None if positions is None else torch.tensor(positions)
    args = build((2, 8, 2, 1, 700, 64), positions=at)
    found = check(run, args, device)
    if at is not None:  # what lies behind is not there yet
        args[1][:, :, positions[0] + 1 :] = torch.nan
        args[2][:, :, positions[0] + 1 :] = torch.nan
        assert torch.equal(run("attention.planned_attention", device, *args)[0], found)


@DEVICES
@pytest.mark.parametrize("where", ["none", "positions", "mask", "all"])
def test_prefill(run: Run, where: str, device: tuple[int, int]) -> None:
    positions = torch.arange(20, 90) if where in ("positions", "all") else None
    mask = torch.arange(110) >= 3 * torch.arange(2)[:, None, None, None] if where in ("mask", "all") else None
    check(run, build((2, 4, 2, 70, 110, 64), mask, positions, causal=where in ("none", "all")), device)


@DEVICES
@pytest.mark.parametrize("seq", [1, 40])
def test_keys_and_values_are_read_where_they_lie(run: Run, seq: int, device: tuple[int, int]) -> None:
    q, k, v, *rest = build((2, 4, 2, seq, 90, 64))
    found = run("attention.planned_attention", device, q, k, v, *rest)[0]
    both = torch.full((2, 2, 2, 128, 64), torch.nan, dtype=HALF)  # a static cache with room for more
    both[0, :, :, :90], both[1, :, :, :90] = k, v
    for moved in ((both[0, :, :, :90], both[1, :, :, :90]), (k.contiguous(), v)):
        assert torch.equal(run("attention.planned_attention", device, q, *moved, *rest)[0], found)


@pytest.mark.parametrize("seq", [1, 40])
def test_order_of_rows_changes_no_bit(run: Run, seq: int) -> None:
    q, k, v, *rest = build((3, 4, 2, seq, 90, 64))
    found = run("attention.planned_attention", MANY, q, k, v, *rest)[0]
    order = torch.tensor([2, 0, 1])
    moved = run("attention.planned_attention", MANY, q[order], k[order], v[order], *rest)[0]
    assert torch.equal(moved, found[order])


@settings(max_examples=20)
@given(st.data())
def test_random_batches(run: Run, data: st.DataObject) -> None:
    seq = data.draw(st.sampled_from([1, 2, 7, 50]))
    group, kv_heads, length = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 90))
    sizes = (
        data.draw(st.integers(1, 3)),
        group * kv_heads,
        kv_heads,
        seq,
        length,
        data.draw(st.sampled_from([32, 72])),
    )
    torch.manual_seed(length)
    positions = torch.randint(-1, length + 3, (seq,)) if data.draw(st.booleans()) else None
    mask = torch.rand(sizes[0], 1, seq, length) > 0.3 if data.draw(st.booleans()) else None
    args = build(sizes, mask, positions, data.draw(st.booleans()), data.draw(st.sampled_from([HALF, FP32])))
    check(run, args, data.draw(st.sampled_from([FEW, MANY])))
