"""What the GPU benchmark compares with, without a GPU: it is given the same work, or says why it is not there."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import Case, Work
from torch import Tensor

from bench.gpu import peers
from qwenopt.ops import MOE_EXPERTS, PAGED_ATTENTION
from qwenopt.testing.cases import case
from qwenopt.testing.formulas import FORMULAS
from qwenopt.testing.tolerance import assert_as_accurate, assert_near_eager


class Wrapper:
    """FlashInfer's decode wrapper by its documentation, in float64: row r has pages ids[starts[r]:starts[r + 1]]."""

    def __init__(self, space: Tensor, layout: str) -> None:
        assert layout == "HND"

    def plan(
        self, starts: Tensor, ids: Tensor, last: Tensor, heads: int, groups: int, dim: int, page_size: int, **more: Any
    ) -> None:
        assert starts.dtype == ids.dtype == last.dtype == torch.int32
        self.rows = [ids[a:b] for a, b in zip(starts.tolist(), starts[1:].tolist(), strict=False)]
        self.last, self.page_size, self.scale, self.heads = last.tolist(), page_size, more["sm_scale"], heads

    def run(self, q: Tensor, pools: tuple[Tensor, Tensor]) -> Tensor:
        out = []
        for row, (pages, last) in enumerate(zip(self.rows, self.last, strict=True)):
            present = (len(pages) - 1) * self.page_size + last
            k, v = (p[pages].double().transpose(0, 1).flatten(1, 2)[:, :present] for p in pools)
            k, v = (t.repeat_interleave(self.heads // len(t), 0) for t in (k, v))
            weights = torch.einsum("hd,hkd->hk", q[row].double(), k).mul(self.scale).softmax(-1)
            out.append(torch.einsum("hk,hkd->hd", weights, v))
        return torch.stack(out).to(q.dtype)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    module.BatchDecodeWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(peers, "WORKSPACE_BYTES", 8)


@pytest.mark.parametrize("detail", ["ragged-p16", "3x40-p32", "2x64-p64"])
def test_flashinfer_is_given_the_same_keys(flashinfer: None, detail: str) -> None:
    tokens = 16 if "ragged" in detail else int(detail[0])
    (args, *_) = Case("paged_attention", "0.6B", tokens, torch.float32, detail).build().variants
    found = dict(peers.peers(Case("paged_attention", "0.6B", tokens, detail=detail), Work([args], 0, 0)))
    run: Any = found["flashinfer"]
    for _ in range(2):  # planned, then as planned
        assert_as_accurate(run(*args), PAGED_ATTENTION.reference(*args), FORMULAS["paged_attention"](*args))


def test_where_flashinfer_is_not(flashinfer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (args, *_) = Case("paged_attention", "0.6B", 1, detail="1x16-p16-int8").build().variants
    assert peers.FlashInfer.why_not(args) == "it has no int8 pages"
    monkeypatch.delitem(sys.modules, "flashinfer")
    assert "flashinfer is not installed" in str(peers.FlashInfer.why_not(args))


@pytest.mark.parametrize(("tokens", "names"), [(2, {"grouped_mm", "batched_mm"}), (20, {"grouped_mm"})])
def test_experts_of_transformers(tokens: int, names: set[str]) -> None:
    x, indices, weights, *rest = case("moe_experts", "decode").build()
    args = (x[:1].repeat(tokens, 1), indices[:1].repeat(tokens, 1), weights[:1].repeat(tokens, 1), *rest)
    found = dict(peers.peers(Case("moe_experts", "30B-A3B", tokens), Work([args], 0, 0)))
    assert set(found) == names
    for run in found.values():
        assert callable(run)
        # Sums in another order, rounded less often than a layer's: up to 1.2e-6 of the 4.5e-6 allowed (2026-11-28).
        assert_near_eager(run(*args), MOE_EXPERTS.reference(*args), num_layers=1)
    inductor = dict(peers.peers(Case("moe_experts", "30B-A3B", tokens, detail="inductor"), Work([args], 0, 0)))
    assert set(inductor) == {f"{name} by Inductor" for name in names}
