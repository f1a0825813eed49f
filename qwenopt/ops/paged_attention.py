"""paged_attention: attention over keys and values where they lie in a pool of pages (Kwon et al., arXiv 2309.06180)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwenopt.ops import triton
from qwenopt.ops.kv_append import check_pools
from qwenopt.ops.kv_gather import check_table, kv_gather, paged_mask
from qwenopt.ops.op import Op


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
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if mask is not None and mask.dtype == torch.bool:
        out = torch.where(mask.any(-1, keepdim=True), out, torch.zeros((), dtype=q.dtype, device=q.device))
    return out.transpose(1, 2).contiguous().transpose(1, 2)


PAGED_ATTENTION = Op(paged_attention, check=_check)
PAGED_ATTENTION.provider("triton", "cuda", available=triton.available, accepts=triton.accepts_paged_attention)(
    triton.paged_attention
)
