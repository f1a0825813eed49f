"""paged_attention with one program for each block of queries and each key/value head: prefill, where blocks abound."""

from __future__ import annotations

import triton
import triton.language as tl

from qwenopt.triton_kernels.paged_tiles import attend, row_tokens, store_block


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_keys", "num_pages"])
def blocks_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, starts_ptr, positions_ptr, mask_ptr, out_ptr,
    s, num_rows, num_tokens, num_keys, num_pages, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Packed rows: block b of row r is number `starts[r] // BLOCK_Q + r + b`, which no other block of the batch has and
    which is below `num_tokens // BLOCK_Q + num_rows + 1`; numbers that no block has end at once. Rows of up to SKIP
    tokens are left to `flat_kernel`. Tokens behind the last row are a row that sees nothing."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    PACKED: tl.constexpr = starts_ptr is not None
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks see most keys: begin with them
    head = tl.program_id(1)
    if PACKED:
        rows = tl.arange(0, ROWS)
        begins, _ = row_tokens(starts_ptr, rows, num_rows, num_tokens)
        row = tl.sum(((begins // BLOCK_Q + rows <= block) & (rows <= num_rows)).to(tl.int32)) - 1
    else:
        per_row = tl.cdiv(num_tokens, BLOCK_Q)
        row = block // per_row
    begin, count = row_tokens(starts_ptr, row, num_rows, num_tokens)
    if PACKED:
        if (count <= SKIP) & (row < num_rows):
            return
        block -= begin // BLOCK_Q + row
    else:
        block -= row * per_row
    token, queries = begin + block * BLOCK_Q, tl.minimum(count - block * BLOCK_Q, BLOCK_Q)
    if queries <= 0:
        return
    out, _ = attend(
        q_ptr, table_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, positions_ptr, mask_ptr, s,
        row, token, queries, head, num_rows, num_keys, num_pages, scale, 0, num_keys, True, True,
        GROUP, PAGE, DIM, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, MASK, PACKED,
        2 if WINDOW == 0 and MASK == "none" else 1,
    )  # fmt: skip
    store_block(out_ptr, out, s, row, token, queries, head, GROUP, DIM, PACKED)
