"""paged_attention of decoding on a GPU: a query at a time, all heads of a group at once, cut by the lengths there."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops import cpu, triton
from qwenopt.ops.cuda.kv_append import POOL_NAMES, pools_fit
from qwenopt.ops.cuda.launch import Launch, Run, pack
from qwenopt.ops.triton import paged_attention as by_triton

HEAD_DIMS = (64, 128)
MAX_GROUP = 16
PAGE_SIZE_MULTIPLE = 16  # keys are read in runs of so many; a run lies in one page
THREADS = 128
BLOCKS_OF_A_MULTIPROCESSOR = 3  # by registers
# Queries read their keys one at a time: with more of them than this for each row, a kernel of blocks of queries is
# better. Decided at the call, so that one graph serves all lengths.
MAX_QUERIES_OF_A_ROW = 4


def accepts(
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
    dim, group, page_size = q.shape[3], q.shape[1] // k_pool.shape[1], k_pool.shape[2]
    if q.dtype != torch.bfloat16:
        return f"dtype {q.dtype} (kernel: bfloat16)"
    if dim not in HEAD_DIMS or group > MAX_GROUP:
        return f"head_dim {dim}, {group} query heads for each key/value head (kernel: {HEAD_DIMS}, up to {MAX_GROUP})"
    if page_size % PAGE_SIZE_MULTIPLE:
        return f"pages of {page_size} (kernel: multiples of {PAGE_SIZE_MULTIPLE})"
    if mask is not None:
        return "a mask (kernel: positions)"
    for name, t in (("q", q), ("k_pool", k_pool), ("v_pool", v_pool)):
        # Eight neighbours are read at once; a query that begins elsewhere is copied at the call.
        if any(stride % 8 for stride in t.stride()[:3]) or (name != "q" and t.storage_offset() % 8):
            return f"{name} has strides {t.stride()[:3]}, offset {t.storage_offset()} (kernel: multiples of 8)"
    indices = {"q_starts": q_starts, "q_positions": q_positions}
    return (
        pools_fit(k_pool, v_pool, k_scale, v_scale)
        or cpu.last_dim_contiguous(q=q, block_table=block_table)
        or cpu.contiguous(**{name: t for name, t in indices.items() if t is not None})
    )


def paged_attention_of_any(
    run: Run,
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
    """Decoding by this kernel; many queries by Triton's, where that can be used."""
    args = (q, k_pool, v_pool, k_scale, v_scale, block_table, q_starts, q_positions)
    by_tiles = not is_decoding(q, block_table) and triton.available() is None
    if by_tiles and by_triton.accepts(*args, mask, window, scale) is None:
        return by_triton.paged_attention(*args, mask, window, scale)
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    return paged_attention(run, num_sms, *args, window, scale)


def is_decoding(q: Tensor, block_table: Tensor) -> bool:
    """Whether there are few enough queries for the rows."""
    return q.shape[0] * q.shape[2] <= MAX_QUERIES_OF_A_ROW * block_table.shape[0]


def paged_attention(
    run: Run,
    num_sms: int,
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    q_starts: Tensor | None,
    q_positions: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    """`paged_attention` without a mask, as it is run on a device of so many multiprocessors. Right for any lengths."""
    (batch, heads, seq, dim), groups = q.shape, k_pool.shape[1]
    q = q if q.data_ptr() % 16 == 0 else q.clone(memory_format=torch.preserve_format)
    out = torch.empty((batch, seq, heads, dim), dtype=q.dtype, device=q.device)
    tokens = batch * seq
    if out.numel():
        pieces = max(1, -(-BLOCKS_OF_A_MULTIPROCESSOR * num_sms // groups))
        blocks = pieces + tokens
        partial = torch.empty((blocks, heads, dim + 2), dtype=torch.float32, device=q.device)
        done = torch.zeros((tokens, groups), dtype=torch.int32, device=q.device)
        tensors = (q, k_pool, v_pool, k_scale, v_scale, block_table, q_starts, q_positions, out, partial, done)
        args = pack(
            *tensors,
            *(batch, heads, groups, seq, *block_table.shape, k_pool.shape[2]),
            *(stride for t in (q, k_pool, v_pool) for stride in t.stride()[:3]),
            *(block_table.stride(0), window, pieces, float(scale)),
        )
        run(Launch(f"paged_attention_{POOL_NAMES[k_pool.dtype]}_{dim}", (blocks, groups, 1), THREADS, args))
    return out.transpose(1, 2)
