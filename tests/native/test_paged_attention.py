"""paged_attention: against fp64 for ragged rows, page sizes, groups and windows; what was not written does not leak."""

import pytest
import torch

from qwenopt.testing.paged import Rows, exact, in_pages, order_bias

PAGE_SIZES = [16, 32, 48, 64, 256, 1, 24]
FEW_ROWS = 8  # of queries and of heads of a group, up to which codes are multiplied as they are


def random_rows(check, lengths, groups, dim, dtype, page_size, coded=False, hidden=()):
    keys, values = ([check.randn(groups, n, dim, dtype=dtype) for n in lengths] for _ in range(2))
    return in_pages(keys, values, page_size, coded, hidden)


def packed_queries(check, rows: Rows, queries, heads, dtype, padding=0):
    """Queries that end where their row ends, packed row after row, and tokens of no row behind them."""
    dim = rows.keys[0].shape[2]
    positions = [torch.arange(k.shape[1] - n, k.shape[1]) for k, n in zip(rows.keys, queries, strict=True)]
    positions.append(torch.full((padding,), 5))
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    q = check.randn(1, sum(queries) + padding, heads, dim, dtype=dtype).transpose(1, 2)
    return q, starts, torch.cat(positions)


def close(check, out, q, k, v, bias):
    """Queries [H, n, D] of one row: what rounding allows, as in test_attention."""
    d, dtype = q.shape[-1], q.dtype
    if k.dtype != dtype and q.shape[0] // k.shape[0] * q.shape[1] > FEW_ROWS:
        k, v = k.to(dtype), v.to(dtype)  # codes times scales are made numbers of the dtype where many rows need them
    expected, size, score_size = exact(q, k, v, bias, d**-0.5)
    extra = 4 * (2 * (d + 8) * check.unit(torch.float32)) * (score_size + 1)
    extra = extra + (check.unit(torch.bfloat16) if dtype == torch.bfloat16 else 0)
    check.dot_close(out, expected, size, terms=k.shape[1] + 8, extra=extra)


def compare_packed(kernels, check, rows, q, starts, positions, window=0):
    out = kernels.paged_attention(q, rows.pools, rows.table, starts, positions, window=window)
    ends = starts.tolist()
    for r, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        if b > a:
            bias = order_bias(positions[a:b], rows.keys[r].shape[1], window)
            close(check, out[0, :, a:b], q[0, :, a:b], rows.keys[r], rows.values[r], bias)
    assert (out[0, :, ends[-1] :] == 0).all()
    return out


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 128), (3, 3, 36), (16, 1, 64), (5, 1, 250)], ids=str)
def test_ragged_rows(kernels, check, isa, dtype, heads, groups, dim, page_size, coded):
    """Decoding, chunks and rows without a query side by side, with tokens of no row behind them."""
    rows = random_rows(check, [1, 300, 65, 17, 130, 40], groups, dim, dtype, page_size, coded)
    q, starts, positions = packed_queries(check, rows, [1, 1, 0, 17, 40, 3], heads, dtype, padding=3)
    compare_packed(kernels.on(isa), check, rows, q, starts, positions)


@pytest.mark.parametrize("group", range(1, 17))
def test_groups(kernels, check, isa, dtype, group):
    rows = random_rows(check, [70, 257], 2, 32, dtype, 16)
    for queries in ([1, 1], [2, 9]):
        q, starts, positions = packed_queries(check, rows, queries, 2 * group, dtype)
        compare_packed(kernels.on(isa), check, rows, q, starts, positions)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
def test_long_rows_are_cut(kernels, check, isa, dtype, threads, coded):
    """One long row beside short ones: its keys are shared out, and their parts are put together."""
    kernels.threads = threads
    rows = random_rows(check, [2500, 30, 200], 1, 64, dtype, 16, coded)
    for queries in ([1, 1, 1], [5, 1, 0], [20, 2, 3]):
        q, starts, positions = packed_queries(check, rows, queries, 2, dtype)
        made = kernels.on(isa)
        out = compare_packed(made, check, rows, q, starts, positions)
        again = made.paged_attention(q, rows.pools, rows.table, starts, positions)
        check.same_bits(again, out)


@pytest.mark.parametrize("window", [1, 7, 16, 64, 100, 1000])
@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
def test_window(kernels, check, isa, dtype, queries, window, coded):
    """Keys behind the window were never written, and their pages are gone."""
    lengths = [450, 64, 129]
    hidden = [max(n - queries + 1 - window, 0) for n in lengths]
    rows = random_rows(check, lengths, 2, 64, dtype, 16, coded, hidden)
    q, starts, positions = packed_queries(check, rows, [queries] * 3, 4, dtype)
    compare_packed(kernels.on(isa), check, rows, q, starts, positions, window)


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
def test_page_size_changes_no_bit(kernels, check, isa, dtype, coded):
    lengths, queries = [700, 33, 256, 1], [1, 30, 9, 1]
    keys, values = ([check.randn(2, n, 64, dtype=dtype) for n in lengths] for _ in range(2))
    made, outs = kernels.on(isa), []
    for page_size in PAGE_SIZES:
        rows = in_pages(keys, values, page_size, coded)
        if not outs:
            q, starts, positions = packed_queries(check, rows, queries, 4, dtype)
        outs.append(made.paged_attention(q, rows.pools, rows.table, starts, positions))
        check.same_bits(outs[-1], outs[0])


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_pages_give_the_bits_of_one_piece(kernels, check, isa, dtype, queries):
    """Where the work is cut alike, attention over the same keys in one piece has the same bits."""
    rows = random_rows(check, [200], 2, 64, dtype, 16)
    q, starts, positions = packed_queries(check, rows, [queries], 4, dtype)
    made = kernels.on(isa)
    one_piece = made.attention(q, rows.keys[0][None], rows.values[0][None], None, positions)
    check.same_bits(made.paged_attention(q, rows.pools, rows.table, starts, positions), one_piece)


def batch_bias(shape, positions, mask, window):
    b, h, s, length = shape
    bias = torch.zeros(shape, dtype=torch.float64)
    if positions is not None:
        bias = bias + order_bias(positions, length, window)
    if mask is not None:
        full = mask.expand(shape)
        bias = bias.masked_fill(~full, -torch.inf) if mask.dtype == torch.bool else bias + full.double()
    return bias


def compare_batch(kernels, check, rows, q, positions, mask, window=0):
    """Every row has as many keys as the table has places for."""
    out = kernels.paged_attention(q, rows.pools, rows.table, None, positions, mask, window)
    length = rows.table.shape[1] * rows.pools[0].shape[2]
    bias = batch_bias((*q.shape[:3], length), positions, mask, window)
    for b in range(q.shape[0]):
        k, v = (torch.cat((t, t.new_zeros(t.shape[0], length - t.shape[1], t.shape[2])), 1)
                for t in (rows.keys[b], rows.values[b]))  # fmt: skip
        close(check, out[b], q[b], k, v, bias[b])
    return out


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 4, 33])
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
def test_batch_with_left_padding(kernels, check, isa, dtype, queries, kind, coded):
    """Padding was never written; the mask hides it."""
    length, hidden = 200, [0, 3, 70]
    rows = random_rows(check, [length] * 3, 2, 64, dtype, 16, coded, hidden)
    q = check.randn(3, queries, 8, 64, dtype=dtype).transpose(1, 2)
    positions = torch.arange(length - queries, length)
    if kind is None:
        for r in range(3):
            rows.table[r] = rows.table[0]
            rows.keys[r], rows.values[r] = rows.keys[0], rows.values[0]
        compare_batch(kernels.on(isa), check, rows, q, positions, None)
        return
    width = rows.table.shape[1] * 16
    seen = torch.arange(width) >= torch.tensor(hidden).view(3, 1, 1, 1)
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(kind)
    compare_batch(kernels.on(isa), check, rows, q, positions, mask)
    seen = seen & (torch.arange(width) < length)
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(kind)
    compare_batch(kernels.on(isa), check, rows, q, None, mask)


@pytest.mark.parametrize("heads", [1, 8])
def test_batch_with_random_masks(kernels, check, isa, dtype, heads):
    rows = random_rows(check, [1300, 1300], 2, 32, dtype, 64)
    q = check.randn(2, 3, 8, 32, dtype=dtype).transpose(1, 2)
    mask = torch.rand(2, heads, 3, rows.table.shape[1] * 64) > 0.4
    mask[..., 1300:] = False
    mask[1, :, 1] = False  # a row that sees nothing
    out = compare_batch(kernels.on(isa), check, rows, q, None, mask)
    assert (out[1, :, 1] == 0).all()
    compare_batch(kernels.on(isa), check, rows, q, torch.tensor([600, 900, 1299]), mask, window=500)


@pytest.mark.parametrize("group", [1, 4, 9])
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
def test_nan_in_what_is_seen_shows(kernels, check, isa, dtype, group, coded):
    rows = random_rows(check, [200], 1, 64, dtype, 16, coded)
    q, starts, positions = packed_queries(check, rows, [1], group, dtype)
    made = kernels.on(isa)

    def poisoned(which, at=150):
        pools = [None if t is None else t.clone() for t in rows.pools]
        pool = pools[which + 2] if coded else pools[which]
        pool[int(rows.table[0, at // 16]), 0, at % 16] = torch.nan
        return made.paged_attention(q, pools, rows.table, starts, positions)

    assert poisoned(0).isnan().all()
    assert poisoned(1).isnan().all()
    assert not made.paged_attention(q, rows.pools, rows.table, starts, positions).isnan().any()


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
def test_scores_that_grow_from_block_to_block(kernels, check, isa, dtype, coded):
    """The maximum moves in every block, and what was summed before is scaled down; values of very different sizes."""
    q = check.randn(1, 1, 4, 64, dtype=dtype).transpose(1, 2)
    keys = [check.randn(1, 700, 64, dtype=dtype) + q[0, 0] * torch.arange(700).div(700).view(1, 700, 1).to(dtype)]
    values = [check.randn(1, 700, 64, dtype=dtype) * torch.logspace(-3, 3, 700).view(1, 700, 1).to(dtype)]
    rows = in_pages(keys, values, 16, coded)
    starts, positions = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([699])
    compare_packed(kernels.on(isa), check, rows, q, starts, positions)


def test_queries_that_see_nothing(kernels, check, isa, dtype):
    rows = random_rows(check, [30], 2, 32, dtype, 16)
    q = check.randn(1, 3, 4, 32, dtype=dtype).transpose(1, 2)
    starts, positions = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([-1, 29, -50])
    out = compare_packed(kernels.on(isa), check, rows, q, starts, positions)
    assert (out[0, :, 0] == 0).all()
    assert (out[0, :, 2] == 0).all()


def test_starts_are_forced_into_order(kernels, check, isa, dtype):
    """A table of starts that makes no sense reads and writes nothing beyond the tokens."""
    rows = random_rows(check, [30, 30, 30], 2, 32, dtype, 16)
    q = check.randn(1, 6, 4, 32, dtype=dtype).transpose(1, 2)
    positions = torch.full((6,), 29)
    for starts in ([0, 99, -5, 3], [7, -1, 2, 2**31 - 1], [0, 0, 0, 0]):
        out = kernels.on(isa).paged_attention(
            q, rows.pools, rows.table, torch.tensor(starts, dtype=torch.int32), positions
        )
        assert not out.isnan().any()


@pytest.mark.parametrize("entry", [-1, -(2**31), 2**31 - 1, 99])
def test_a_wrong_table_reads_inside_the_pool(kernels, check, isa, dtype, entry):
    """Entries that are no pages, of keys that are seen: some page is read, and no memory beyond the pool."""
    rows = random_rows(check, [40, 40], 2, 32, dtype, 16)
    rows.pools[0].nan_to_num_(), rows.pools[1].nan_to_num_()
    q, starts, positions = packed_queries(check, rows, [1, 20], 4, dtype)
    rows.table[:] = entry
    assert not kernels.on(isa).paged_attention(q, rows.pools, rows.table, starts, positions).isnan().any()


def test_strided_pools_and_tables(kernels, check, isa, dtype):
    rows = random_rows(check, [100, 33], 2, 64, dtype, 16)
    q, starts, positions = packed_queries(check, rows, [3, 20], 4, dtype)
    made = kernels.on(isa)
    wanted = made.paged_attention(q, rows.pools, rows.table, starts, positions)
    # [pages, page_size, G, D + 2] seen as [pages, G, page_size, D]
    moved = [torch.nn.functional.pad(p, (0, 2)).transpose(1, 2).contiguous().transpose(1, 2)[..., :64]
             for p in rows.pools[:2]]  # fmt: skip
    table = torch.nn.functional.pad(rows.table, (0, 3))[:, : rows.table.shape[1]]
    found = made.paged_attention(q, (*moved, None, None), table, starts, positions)
    check.same_bits(found, wanted)


def test_no_keys_and_no_pages_give_zeros(kernels, check, isa, dtype):
    q, positions = check.randn(1, 2, 3, 16, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    pool = torch.empty(4, 2, 16, 16, dtype=dtype)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    for pages, width in ((4, 0), (0, 2), (0, 0)):
        table = torch.zeros(1, width, dtype=torch.int32)
        out = kernels.on(isa).paged_attention(q, (pool[:pages], pool[:pages], None, None), table, starts, positions)
        assert (out == 0).all()


def test_arguments_are_checked(kernels):
    C = kernels.C
    with pytest.raises(ValueError, match="paged_attention: page size 0; it must be at least 1"):
        C.paged_attention_scratch_bytes(1, 2, 2, 1, 1, 1, 0, 64, False, 1)
    with pytest.raises(ValueError, match="paged_attention: 5 query heads and 2 key/value heads; the first must be"):
        C.paged_attention_scratch_bytes(1, 5, 2, 1, 1, 1, 16, 64, False, 1)
    with pytest.raises(ValueError, match=r"paged_attention: head size 258; it must be even and 2\.\.256"):
        C.paged_attention_scratch_bytes(1, 2, 2, 1, 1, 1, 16, 258, False, 1)
    with pytest.raises(ValueError, match="134217728 pages of 16 keys for each row; at most"):
        C.paged_attention_scratch_bytes(1, 2, 2, 1, 1, 1 << 27, 16, 64, False, 1)
