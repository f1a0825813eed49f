"""What else computes a case: torch (cuBLAS, flash attention), transformers, FlashInfer where it is, eager."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from cases import Case, Work
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import OPS

Peer = tuple[str, Callable[..., Any] | str]  # its name; what to call, or why there is nothing to call

FEW_TOKENS = 8  # batched_mm copies the weights of every token's experts
WORKSPACE_BYTES = 128 << 20


def peers(case: Case, work: Work) -> Iterator[Peer]:
    """The implementations beside ours. Where `torch` is a provider of the op, the reference is cuBLAS and the like."""
    if case.op == "moe_experts":
        yield from _experts(case, work)
        return
    if case.op == "attention" and not case.detail:
        yield "sdpa", _sdpa
    if case.op == "paged_attention":
        yield "flashinfer", FlashInfer.why_not(work.variants[0]) or FlashInfer()
    yield "cublas" if case.op == "linear" else "eager", OPS[case.op].reference


def _experts(case: Case, work: Work) -> Iterator[Peer]:
    weights = work.variants[0][3:]
    names = ("grouped_mm", "batched_mm") if case.tokens <= FEW_TOKENS else ("grouped_mm",)
    for name in names:
        if case.detail == "inductor":
            yield f"{name} by Inductor", harness.experts_of_transformers(name, *weights, compiled=True)
        else:
            yield name, harness.experts_of_transformers(name, *weights)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Any, positions: Any, causal: bool, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)


class FlashInfer:
    """`paged_attention` of one query a row by FlashInfer's decode wrapper (docs.flashinfer.ai, flashinfer.decode).

    Planned once for each block table, on the host, as its users do once for all layers of a step; only runs are timed.
    """

    def __init__(self) -> None:
        self._planned: dict[int, Any] = {}

    @staticmethod
    def why_not(args: tuple[Any, ...]) -> str | None:
        """Why it cannot be had for these arguments."""
        if importlib.util.find_spec("flashinfer") is None:
            return "flashinfer is not installed (pip install flashinfer-python)"
        return "it has no int8 pages" if args[1].dtype == torch.int8 else None

    def __call__(self, q: Tensor, k_pool: Tensor, v_pool: Tensor, *rest: Any) -> Tensor:
        """`rest` as of the op: scales, block_table, q_starts, q_positions, mask, window, scale."""
        _, _, table, _, positions, _, _, scale = rest
        if id(table) not in self._planned:
            self._planned[id(table)] = _plan(q, k_pool, table, positions, scale)
        out: Tensor = self._planned[id(table)].run(q.transpose(1, 2)[0], (k_pool, v_pool))
        return out[None].transpose(1, 2)


def _plan(q: Tensor, pool: Tensor, table: Tensor, positions: Tensor, scale: float) -> Any:
    import flashinfer

    _, groups, page_size, dim = pool.shape
    lengths = (positions + 1).tolist()
    pages = [-(-n // page_size) for n in lengths]
    starts = torch.tensor([0, *pages]).cumsum(0).to(table)
    last = torch.tensor([n - (p - 1) * page_size for n, p in zip(lengths, pages, strict=True)]).to(table)
    ids = torch.cat([line[:count] for line, count in zip(table, pages, strict=True)])
    space = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND")
    types = {"q_data_type": q.dtype, "kv_data_type": pool.dtype}
    wrapper.plan(starts, ids, last, q.shape[1], groups, dim, page_size, sm_scale=scale, **types)
    return wrapper
