"""top_tokens: the k largest logits of each row with their ids, the same ones on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, NotPlanned, Steps, need_contiguous
from qwenopt.ops.triton import top_tokens as by_triton

MAX_K = 1024  # of the kernel


def _check(logits: Tensor, k: int) -> None:
    torch._check(
        logits.dim() == 2 and 0 < k <= logits.shape[1] < 1 << 30,
        lambda: f"top_tokens: logits {tuple(logits.shape)}, k {k}; logits must be (R, V) with V >= k >= 1, V < 2**30",
    )
    torch._check(
        logits.is_floating_point(), lambda: f"top_tokens: {logits.dtype} where a floating point dtype is needed"
    )


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the `k` largest of each row of `logits` [R, V], of any floating dtype, in descending order.

    Returns `(values, ids)`: values [R, k] in `logits.dtype`, ids int64 [R, k]. Of equal logits the lower id comes
    first; NaN is larger than all numbers and 0 equals -0, as in `torch.sort(stable=True)`.
    """
    _check(logits, k)
    if k == 1:
        ids = logits.argmax(-1, keepdim=True)
    elif k > MAX_K:
        ids = logits.sort(dim=-1, descending=True, stable=True)[1][:, :k].contiguous()
    else:
        ids = _top_ids(logits, k)
    return logits.gather(1, ids), ids


def _top_ids(logits: Tensor, k: int) -> Tensor:
    """int64 [R, k]. topk leaves open which of equal values it takes, so its ids are not used: only its least value."""
    size = logits.shape[1]
    least = logits.topk(k)[0][:, -1:]
    above = torch.where(least.isnan(), False, (logits > least) | logits.isnan())
    equal = torch.where(least.isnan(), logits.isnan(), logits == least)
    low_first = torch.arange(size, 0, -1, dtype=torch.int32, device=logits.device)
    key = torch.where(above, low_first + size, torch.where(equal, low_first, 0))
    ids = (-key.topk(k)[0]).remainder(size).to(torch.int64)
    # The larger ones now come first, by their ids: a stable sort by value leaves only what is asked for.
    return ids.gather(1, logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)[1])


TOP_TOKENS = Op(top_tokens, check=_check)


def _accepts(logits: Tensor, k: int) -> str | None:
    if k > MAX_K:
        return f"k {k} (kernel: up to {MAX_K})"
    return cpu.one_dtype(logits) or cpu.last_dim_contiguous(logits=logits)


def _operands(logits: Any, values: Any, ids: Any, scratch: Any, stride: int) -> tuple[Any, ...]:
    addresses = tuple(t.data_ptr() for t in (logits, values, ids, scratch))
    return (*addresses, *logits.shape, values.shape[1], stride, cpu.code(logits))


def _record(steps: Steps, logits: Array, k: int) -> tuple[Array, Array]:
    need_contiguous(logits=logits)
    if logits.dtype not in cpu.DTYPE_CODES:
        raise NotPlanned(f"logits are {logits.dtype}")
    rows, size = logits.static_shape()
    values, ids = steps.empty((rows, k), logits.dtype), steps.empty((rows, k), torch.int64)
    scratch = steps.scratch(cpu.lib().top_tokens_scratch_bytes(rows, size, k, steps.threads))
    steps.add("top_tokens", _operands(logits, values, ids, scratch, size), (logits,), (values, ids, scratch))
    return values, ids


@TOP_TOKENS.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def top_tokens_cpu(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, size = logits.shape
    values, ids = logits.new_empty((rows, k)), torch.empty((rows, k), dtype=torch.int64)
    nbytes = cpu.lib().top_tokens_scratch_bytes(rows, size, k, cpu.threads())
    scratch = torch.empty(nbytes, dtype=torch.uint8)
    cpu.lib().top_tokens(*_operands(logits, values, ids, scratch, logits.stride(0)), cpu.threads())
    return values, ids


TOP_TOKENS.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(by_triton.top_tokens)
