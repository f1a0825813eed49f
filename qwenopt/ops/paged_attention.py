"""paged_attention: attention over keys and values where they lie in a pool of pages (Kwon et al., arXiv 2309.06180)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import cpu, triton
from qwenopt.ops.attention import MASK_KINDS, MAX_HEAD_DIM
from qwenopt.ops.cuda import paged_attention as cuda_kernels
from qwenopt.ops.cuda.providers import register
from qwenopt.ops.kv_append import check_pools, pools_fit
from qwenopt.ops.kv_gather import check_table, kv_gather, paged_mask
from qwenopt.ops.op import Op
from qwenopt.ops.steps import Array, NotPlanned, Steps
from qwenopt.ops.triton import paged_attention as by_triton


def _check(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
) -> None:
    op = "paged_attention"
    check_pools(op, k_pool, v_pool, k_scale, v_scale)
    ok = q.dim() == 4 and q.shape[3] == k_pool.shape[3] and q.shape[1] % k_pool.shape[1] == 0
    torch._check(
        ok and (k_pool.dtype in (q.dtype, torch.int8)),
        lambda: (
            f"{op}: q {tuple(q.shape)} {q.dtype} and pools {tuple(k_pool.shape)} {k_pool.dtype}; need (B, H, S, D) and "
            "(pages, G, page_size, D) in one dtype (or int8 pools), H a multiple of G"
        ),
    )
    check_table(op, block_table, q_starts, q.shape[0])
    torch._check(
        q_starts is None or (q.shape[0] == 1 and q_positions is not None and mask is None),
        lambda: (
            f"{op}: packed rows (q_starts) with {q.shape[0]} batch entries, "
            f"{'no ' if q_positions is None else ''}q_positions and {'no' if mask is None else 'a'} mask; "
            "they need 1, positions and no mask"
        ),
    )
    if q_positions is not None:
        torch._check(
            q_positions.dim() == 1 and q_positions.shape[0] == q.shape[2] and q_positions.dtype == torch.int64,
            lambda: (
                f"{op}: q_positions {tuple(q_positions.shape)} {q_positions.dtype}; need torch.int64 ({q.shape[2]},)"
            ),
        )
    if mask is not None:
        full = (*q.shape[:3], block_table.shape[1] * k_pool.shape[2])
        pairs = zip(reversed(mask.shape), reversed(full), strict=False)
        torch._check(
            mask.dim() <= 4 and all(a == 1 or a == b for a, b in pairs),
            lambda: f"{op}: mask {tuple(mask.shape)}; it must broadcast to (B, H, S, keys of the table) = {full}",
        )
    torch._check(window >= 0, lambda: f"{op}: window {window}; need 0 (none) or more")


def _batch_mask(q_positions: Tensor | None, mask: Tensor | None, num_keys: int, window: int) -> Tensor | None:
    """What the queries of a batch see, by position and by mask; None for everything."""
    if q_positions is None:
        return mask
    keys = torch.arange(num_keys, device=q_positions.device)
    seen = keys <= q_positions[:, None]
    if window:
        seen = seen & (keys > q_positions[:, None] - window)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.where(seen, -torch.inf)


def _only_seen(x: Tensor, mask: Tensor | None) -> Tensor:
    """Keys or values [B, G, K, D] with 0 where no query looks: such places may hold anything, NaN too."""
    if mask is None:
        return x
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    seen = seen.view((1,) * (4 - seen.dim()) + seen.shape).any(2).any(1)
    return torch.where(seen[:, None, :, None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """`softmax(q @ k.T * scale + mask) @ v` of each row over its pages, a key/value head shared by H / G query heads.

    q [B, H, S, D]; k_pool and v_pool [pages, G, page_size, D], with float32 scales [pages, G, page_size] where they are
    int8. Key j of row r is in page `block_table[r, j // page_size]` (int32 [rows, M]) at `j % page_size`; entries of
    the table behind the last visible key are not looked at.

    Packed (`q_starts` int32 [rows + 1], B = 1): tokens q_starts[r] to q_starts[r + 1] are the queries of row r, none,
    one or many. Otherwise the rows are the batch entries. A query sees keys up to its place in its row (`q_positions`
    int64 [S], if given), of these the last `window`, if that is not 0, and where `mask`, broadcastable to
    [B, H, S, M * page_size] and bool (True: visible) or additive float, allows it. A query of no row, or one that sees
    no key, gives 0. Returns [B, H, S, D], laid out as a transposed [B, S, H, D].
    """
    _check(q, k_pool, v_pool, k_scale, v_scale, block_table, q_starts, q_positions, mask, window, scale)
    num_keys = block_table.shape[1] * k_pool.shape[2]
    k, v = kv_gather(k_pool, v_pool, k_scale, v_scale, block_table, q_starts is not None, q.dtype)
    if q_starts is not None and q_positions is not None:
        mask = paged_mask(q_starts, q_positions, num_keys, window)
    else:
        mask = _batch_mask(q_positions, mask, num_keys, window)
    k, v = _only_seen(k, mask), _only_seen(v, mask)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if mask is not None and mask.dtype == torch.bool:
        out = torch.where(mask.any(-1, keepdim=True), out, torch.zeros((), dtype=q.dtype, device=q.device))
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(q: Tensor, *rest: Any) -> Tensor:
    """Shapes alone: the reference is two dozen ops, which would be traced for each layer."""
    _check(q, *rest)
    batch, heads, seq, dim = q.shape
    return q.new_empty((batch, seq, heads, dim)).transpose(1, 2)


PAGED_ATTENTION = Op(paged_attention, check=_check, fake=_fake)


def _accepts(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
) -> str | None:
    dim, page_size = q.shape[-1], k_pool.shape[2]
    if not isinstance(dim, int) or dim > MAX_HEAD_DIM or dim % 2 or dim == 0:
        return f"head_dim {dim} (kernel: even, at most {MAX_HEAD_DIM})"
    if not isinstance(page_size, int) or page_size == 0:
        return f"page size {page_size} (kernel: one known when it is compiled, at least 1)"
    if mask is not None and (mask.dim() != 4 or mask.dtype not in MASK_KINDS):
        return f"mask {mask.dtype} of {mask.dim()} dimensions (kernel: bool, float32, bfloat16 or float16 of 4)"
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        return f"block_table of stride {block_table.stride()} (kernel: rows that are contiguous)"
    indices = {"q_starts": q_starts, "q_positions": q_positions}
    return (
        pools_fit(k_pool, v_pool, k_scale, v_scale)
        or cpu.one_dtype(q)
        or cpu.last_dim_contiguous(q=q)
        or cpu.contiguous(**{name: t for name, t in indices.items() if t is not None})
    )


def _sizes(q: Any, k_pool: Any, block_table: Any) -> tuple[Any, ...]:
    batch, heads, seq, dim = q.shape
    pages, groups, page_size, _ = k_pool.shape
    return batch, heads, groups, seq, *block_table.shape, pages, page_size, dim


def _scratch_bytes(q: Any, k_pool: Any, block_table: Any, q_starts: Any, threads: int) -> int:
    batch, heads, groups, seq, rows, width, _, page_size, dim = _sizes(q, k_pool, block_table)
    sizes = (batch, heads, groups, seq, rows, width, page_size, dim)
    return int(cpu.lib().paged_attention_scratch_bytes(*sizes, q_starts is not None, threads))


def _operands(tensors: tuple[Any, ...], out: Any, scratch: Any, window: int, scale: float) -> tuple[Any, ...]:
    q, k_pool, v_pool, _, _, block_table, _, _, mask = tensors
    mask_strides, kind = (0, 0, 0, 0), 0
    if mask is not None:
        mask_strides = mask.expand((*q.shape[:3], block_table.shape[1] * k_pool.shape[2])).stride()
        kind = MASK_KINDS[mask.dtype]
    return (
        *(0 if t is None else t.data_ptr() for t in (*tensors, out, scratch)),
        *_sizes(q, k_pool, block_table),
        *q.stride()[:3],
        *k_pool.stride()[:3],
        *v_pool.stride()[:3],
        block_table.stride(0),
        *mask_strides,
        kind,
        window,
        scale,
        cpu.code(q),
    )


def _record(
    steps: Steps,
    q: Array,
    k_pool: Array,
    v_pool: Array,
    k_scale: Array | None,
    v_scale: Array | None,
    block_table: Array,
    q_starts: Array | None,
    q_positions: Array | None,
    mask: Array | None,
    window: int,
    scale: float,
) -> Array:
    batch, heads, seq, dim = q.static_shape()
    block_table.static_shape()
    if not all(isinstance(size, int) for size in k_pool.shape[1:]):  # there may be any number of pages
        raise NotPlanned(f"pools whose shape is only known at run time: {k_pool.shape}")
    tensors = (q, k_pool, v_pool, k_scale, v_scale, block_table, q_starts, q_positions, mask)
    out = steps.empty((batch, seq, heads, dim), q.dtype)
    scratch = steps.scratch(_scratch_bytes(q, k_pool, block_table, q_starts, steps.threads))
    steps.add("paged_attention", _operands(tensors, out, scratch, window, scale), tensors, (out, scratch))
    return out.transpose(1, 2)


@PAGED_ATTENTION.provider("cpu", "cpu", available=cpu.available, accepts=_accepts, record=_record)
def paged_attention_cpu(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    mask: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    threads = cpu.threads()
    batch, heads, seq, dim = q.shape
    tensors = (q, k_pool, v_pool, k_scale, v_scale, block_table, q_starts, q_positions, mask)
    out = torch.empty((batch, seq, heads, dim), dtype=q.dtype)
    scratch = torch.empty(_scratch_bytes(q, k_pool, block_table, q_starts, threads), dtype=torch.uint8)
    cpu.lib().paged_attention(*_operands(tensors, out, scratch, window, scale), threads)
    return out.transpose(1, 2)


PAGED_ATTENTION.provider("triton", "cuda", available=triton.available, accepts=by_triton.accepts)(
    by_triton.paged_attention
)
# Behind Triton, which is ahead or not by a measurement on a GPU; none was made yet.
register(PAGED_ATTENTION, cuda_kernels.accepts, cuda_kernels.paged_attention_of_any)
