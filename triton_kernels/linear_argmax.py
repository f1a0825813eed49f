"""The argmax of a linear layer in Triton for few rows: the logits stay in registers, and their largest are compared.

The products are those of `linear`, tile by tile. A program leaves the largest of each row of its tile, rounded as the
logits would be, with its place in one whole number; `argmax_kernel` takes the largest of those. For plans that do not
cut K: what is as wide as a vocabulary fills a device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwenopt.triton_kernels.linear import MAX_ROWS, Plan
from qwenopt.triton_kernels.linear_tiles import gemv_tile, skinny_tile
from qwenopt.triton_kernels.ordered import TAKEN, index_of, keys_of

BLOCK = 4096


def num_parts(p: Plan, n: int) -> int:
    """The tiles of `n` columns."""
    return -(-n // p.tile.block_n)


@triton.jit
def argmax_gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, keys_ptr, num_cols, num_inner, weight_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One row of x. Of BLOCK_N columns a program."""
    first = tl.program_id(0) * BLOCK_N
    out, _ = gemv_tile(x_ptr, weight_ptr, None, first, num_cols, num_inner, weight_stride, 0, BLOCK_N, BLOCK_K, EVEN)
    n = tl.arange(0, BLOCK_N)
    keep = n < num_cols - first
    if bias_ptr is not None:
        out += tl.load(bias_ptr + first + n, mask=keep, other=0).to(tl.float32)
    keys = keys_of(out.to(x_ptr.dtype.element_ty).to(tl.float32), first + n)
    tl.store(keys_ptr + tl.program_id(0), tl.max(tl.where(keep, keys, TAKEN), 0))


@triton.jit
def argmax_skinny_kernel(
    x_ptr, weight_ptr, bias_ptr, keys_ptr, num_rows, num_cols, num_inner, x_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """2 to 16 rows of x. Of BLOCK_N columns of all rows a program."""
    part = tl.program_id(0)
    first = part * BLOCK_N
    acc, _ = skinny_tile(
        x_ptr, weight_ptr, None, first, 0, num_inner, num_rows, num_cols, num_inner, x_stride, weight_stride, 0,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN,
    )  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols = n < num_cols - first
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first + n, mask=cols, other=0).to(tl.float32)[None, :]
    keys = keys_of(acc.to(x_ptr.dtype.element_ty).to(tl.float32), first + n[None, :])
    best = tl.max(tl.where(cols[None, :], keys, TAKEN), 1)
    tl.store(keys_ptr + m * tl.num_programs(0) + part, best, mask=m < num_rows)


@triton.jit(do_not_specialize=["num_keys"])
def argmax_kernel(keys_ptr, ids_ptr, num_keys, KEYS: tl.constexpr):
    """The place of the largest of the `num_keys` keys of row `program_id(0)`."""
    row, place = tl.program_id(0), tl.arange(0, KEYS)
    best = tl.full((KEYS,), TAKEN, tl.int64)
    for start in range(0, num_keys, KEYS):
        keys = tl.load(keys_ptr + row * num_keys + start + place, mask=place < num_keys - start, other=TAKEN)
        best = tl.maximum(best, keys)
    tl.store(ids_ptr + row, index_of(tl.max(best, 0)))


def launch(p: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor, ids: Tensor) -> None:
    """The argmax of each row of x [M, K] times weight [N, K] transposed, plus bias [N], to ids int64 [M, 1].

    M is 1 to 16; keys int64 [M, parts] is for what the parts find. Rows of x and of the weight have unit stride. More
    than one row: 16-bit dtypes.
    """
    (rows, k), tile, parts = x.shape, p.tile, keys.shape[1]
    n = weight.shape[0]
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "EVEN": k % tile.block_k == 0}
    if p.splits:
        argmax_skinny_kernel[(parts,)](
            x, weight, bias, keys, rows, n, k, x.stride(0), weight.stride(0), BLOCK_M=MAX_ROWS,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **blocks,
        )  # fmt: skip
    else:
        argmax_gemv_kernel[(parts,)](x, weight, bias, keys, n, k, weight.stride(0), num_warps=tile.num_warps, **blocks)
    argmax_kernel[(rows,)](keys, ids, parts, KEYS=BLOCK, num_warps=8)
