"""Every kernel between guard pages: one byte read or written beyond an operand, on either side, ends the process.

The sanitizers do not see masked and tile loads; the memory management unit sees every one, so `make sanitize` leaves
these tests out. A call runs in a forked
child, so that a fault is one failed test; operands lie in shared memory, so that the results come back.
"""

import ctypes
import mmap
import os
import signal
import sys

import pytest
import torch

from qwenopt import native
from qwenopt.testing.paged import empty_pools, in_pages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory as Linux does")
PAGE = mmap.PAGESIZE
FILL = 0xA5  # of the bytes between an operand and the page's other end
SECONDS = 60  # a call takes milliseconds; a forked child that waits for a thread would wait for ever


class Pages:
    """Tensors in shared memory that begin right after a page without access, or end right before one."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.at_end, self.maps, self.slack = True, [], []

    def place(self, tensor):
        """A contiguous copy of `tensor` against the guard page of the side in question."""
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return tensor.contiguous()
        room = -(-size // PAGE) * PAGE
        start = self.libc.mmap(
            None, room + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1, 0
        )
        assert start not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        self.maps.append((start, room + 2 * PAGE))
        for guard in (start, start + PAGE + room):
            assert self.libc.mprotect(guard, PAGE, 0) == 0
        data = torch.frombuffer((ctypes.c_char * room).from_address(start + PAGE), dtype=torch.uint8).fill_(FILL)
        first = room - size if self.at_end else 0
        self.slack += [data[:first], data[first + size :]]
        placed = data[first : first + size].view(torch.uint8)
        placed = torch.frombuffer(
            (ctypes.c_char * size).from_address(placed.data_ptr()), dtype=tensor.dtype, count=tensor.numel()
        )
        return placed.view(tensor.shape).copy_(tensor)

    def check(self):
        assert all((piece == FILL).all() for piece in self.slack), "written beyond an operand, inside its page"

    def free(self):
        for start, size in self.maps:
            self.libc.munmap(start, size)
        self.maps, self.slack = [], []


class Forked:
    """The native module, its kernels called in a child process; ValueErrors and the like end it too."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        function = getattr(self.module, name)
        return function if name.endswith("_scratch_bytes") else lambda *args: in_child(function, args)


def in_child(function, args):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # no traceback of a fault that the parent will tell of
        signal.alarm(SECONDS)
        try:
            function(*args)
        except BaseException as error:
            os.write(2, f"{error}\n".encode())
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    names = {-signal.SIGSEGV: "touched a page beyond an operand", -signal.SIGALRM: f"took more than {SECONDS} s"}
    assert status == 0, f"{function.__name__} {names.get(status, f'ended with {status}')}"


@pytest.fixture(params=["before", "after"])
def pages(request):
    made = Pages()
    made.at_end = request.param == "after"
    yield made
    made.free()


def guarded(kernels, isa, pages):
    made = kernels.on(isa)
    made.C = Forked(native.C())
    fresh = made.empty
    made.empty = lambda *shape, dtype: pages.place(fresh(*shape, dtype=dtype))
    made.scratch = lambda size: pages.place(torch.full((size,), FILL, dtype=torch.uint8))
    made.keep = lambda scratch, size: None  # nothing is left over: the page ends where the scratch does
    return made


def place_all(pages, value):
    if isinstance(value, tuple):
        return tuple(place_all(pages, v) for v in value)
    return pages.place(value) if isinstance(value, torch.Tensor) else value


def run(kernels, check, isa, pages, name, *args):
    """Results between guard pages have the bits of results in plain memory."""
    plain = getattr(kernels.on(isa), name)(*args)
    placed = place_all(pages, args)
    found = getattr(guarded(kernels, isa, pages), name)(*placed)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, plain)), strict=True):
        check.same_bits(a, b)
    pages.check()
    pages.free()


# Rows: none, one, a few, in tiles with a part of a tile, in blocks. K: odd, of one vector and one more, of tiles.
@pytest.mark.parametrize("m", [0, 1, 2, 3, 5, 18, 70])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 33), (3, 31), (5, 64), (18, 47), (33, 130)])
def test_linear(kernels, check, isa, dtype, pages, m, n, k):
    args = [check.randn(*shape, dtype=dtype) for shape in ((m, k), (n, k), (n,))]
    run(kernels, check, isa, pages, "linear", *args)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 15), (2, 17), (5, 33), (40, 1000)], ids=str)
def test_norms_and_gate(kernels, check, isa, dtype, pages, shape):
    x, y, weight = (check.randn(*s, dtype=dtype) for s in (shape, shape, shape[1:]))
    run(kernels, check, isa, pages, "rms_norm", x, weight, 1e-6)
    run(kernels, check, isa, pages, "add_rms_norm", x, y, weight, 1e-6)
    run(kernels, check, isa, pages, "silu_mul", x, y)


@pytest.mark.parametrize("d", [2, 10, 18, 30, 34, 128])
def test_qk_norm_rope(kernels, check, isa, dtype, pages, d):
    shapes = ((2, 3, 3, d), (2, 3, 1, d), (d,), (d,), (1, 3, d), (1, 3, d))
    run(kernels, check, isa, pages, "qk_norm_rope", *(check.randn(*s, dtype=dtype) for s in shapes), 1e-6)


@pytest.mark.parametrize(("t", "e", "k"), [(1, 1, 1), (3, 7, 7), (2, 15, 2), (5, 17, 3), (2, 130, 8)])
def test_moe_route(kernels, check, isa, dtype, pages, t, e, k):
    run(kernels, check, isa, pages, "moe_route", check.randn(t, e, dtype=dtype), k, True)


# Which experts the tokens go to: apart, all to one, to the last one and beyond (skipped), to nobody.
ROUTES = {
    "spread": lambda t, e: (torch.arange(2 * t) % e).view(t, 2),
    "one": lambda t, e: torch.full((t, 2), 1),
    "skip": lambda t, e: torch.tensor([[e - 1, e]]).repeat(t, 1),
    "nobody": lambda t, e: torch.full((t, 2), e),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("t", "n", "i"), [(0, 32, 32), (1, 1, 1), (3, 33, 17), (9, 32, 32), (21, 64, 96)])
def test_moe_experts(kernels, check, isa, dtype, pages, route, t, n, i):
    e, indices = 3, ROUTES[route](t, 3)
    x, weights, gate_up, down = (
        check.randn(*shape, dtype=dtype) for shape in ((t, n), (t, 2), (e, 2 * i, n), (e, n, i))
    )
    run(kernels, check, isa, pages, "moe_experts", x, indices, weights, gate_up, down)


# Columns beside a vector's, a block's and a part's length; k from one to all.
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(("size", "k"), [(1, 1), (17, 17), (65, 1), (131, 20), (4100, 64), (33001, 1024)])
def test_tail(kernels, check, isa, dtype, pages, rows, size, k):
    logits = check.randn(rows, size, dtype=dtype)
    run(kernels, check, isa, pages, "top_tokens", logits, k)
    run(kernels, check, isa, pages, "logit_signals", logits, size - 1, True)


# (B, H, G, S, L, D): in place, packed, in tiles; head sizes and lengths beside a vector's, a block's and a tile's.
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 2), (2, 4, 2, 1, 65, 34), (1, 2, 1, 1, 300, 128), (1, 4, 2, 9, 63, 18), (1, 3, 1, 20, 130, 66),
     (1, 2, 1, 33, 129, 32), (1, 4, 1, 17, 31, 250)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_attention(kernels, check, isa, dtype, pages, shape, kind):
    b, h, g, s, length, d = shape
    q, k, v = (check.randn(*size, dtype=dtype) for size in ((b, h, s, d), (b, g, length, d), (b, g, length, d)))
    mask = None if kind is None else (torch.rand(b, 1, s, length) > 0.3).to(kind)
    positions = torch.arange(s) + length - s if kind is None else None
    run(kernels, check, isa, pages, "attention", q, k, v, mask, positions)


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "d", "page_size"),
    [([1], [1], 1, 2, 16), ([65, 16], [1, 0], 4, 34, 16), ([300], [1], 2, 128, 64), ([63, 5], [9, 2], 4, 18, 48),
     ([130], [20], 6, 66, 16), ([129, 40], [33, 4], 4, 32, 256), ([31], [17], 8, 250, 32)],
    ids=str,
)  # fmt: skip
def test_paged_attention(kernels, check, isa, dtype, pages, lengths, queries, heads, d, page_size, coded):
    keys, values = ([check.randn(min(heads, 2), n, d, dtype=dtype) for n in lengths] for _ in range(2))
    rows = in_pages(keys, values, page_size, coded)
    q = check.randn(1, heads, sum(queries) + 1, d, dtype=dtype)
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n - s, n) for n, s in zip(lengths, queries, strict=True)] + [torch.zeros(1)])
    args = (q, rows.pools, rows.table, starts, positions.long())
    run(kernels, check, isa, pages, "paged_attention", *args)
    run(kernels, check, isa, pages, "paged_attention", *args, None, 20)
    rows.table.fill_(2**31 - 1)  # pages that do not exist
    run(kernels, check, isa, pages, "paged_attention", *args)


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_paged_attention_with_a_mask(kernels, check, isa, dtype, pages, queries, kind):
    keys, values = ([check.randn(2, 70, 36, dtype=dtype) for _ in range(2)] for _ in range(2))
    rows = in_pages(keys, values, 16)
    q = check.randn(2, 4, queries, 36, dtype=dtype)
    seen = torch.rand(2, 1, queries, rows.table.shape[1] * 16) > 0.3
    seen[..., 70:] = False
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).to(kind)
    run(kernels, check, isa, pages, "paged_attention", q, rows.pools, rows.table, None, None, mask)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("d", [1, 2, 15, 17, 33, 64])
def test_kv_append(kernels, check, isa, dtype, pages, kind, d):
    k, v = (check.randn(1, 2, 4, d, dtype=dtype) for _ in range(2))
    slots = torch.tensor([15, 0, -1, 31])
    plain = empty_pools(2, 2, 16, d, kind if kind != torch.int8 else dtype, kind == torch.int8)
    placed = place_all(pages, plain)
    kernels.on(isa).kv_append(plain, k, v, slots)
    guarded(kernels, isa, pages).kv_append(placed, *place_all(pages, (k, v, slots)))
    for a, b in zip(placed, plain, strict=True):
        assert a is b is None or torch.equal(a.nan_to_num(), b.nan_to_num())
    pages.check()


@pytest.mark.parametrize("size", [2, 14, 18, 30, 34, 66])
def test_float16(kernels, check, isa, pages, size):
    """Its own loads and stores, of whole vectors and of parts; the rest of the kernels is that of the other types."""
    x, weight, heads = (check.randn(*s, dtype=torch.float16) for s in ((5, size), (3, size), (1, 2, 9, size)))
    run(kernels, check, isa, pages, "linear", x, weight)
    run(kernels, check, isa, pages, "add_rms_norm", x, x, weight[0], 1e-6)
    run(kernels, check, isa, pages, "attention", heads[:, :, :1], heads, heads)
    run(kernels, check, isa, pages, "attention", heads, heads, heads, torch.zeros(1, 1, 9, 9, dtype=torch.float16))


def test_a_step_past_the_end_is_caught(kernels, check, pages):
    """The guards themselves: a row more than there is, read and written."""
    x, weight = pages.place(check.randn(4, 1024, dtype=torch.float32)), torch.ones(1024)
    far = pages.place(torch.empty(4, 1024))
    before = 0 if pages.at_end else 4096
    with pytest.raises(AssertionError, match="touched a page beyond an operand"):
        guarded(kernels, 0, pages).C.rms_norm(
            x.data_ptr() - before, weight.data_ptr(), far.data_ptr(), 5, 1024, 1024, 1e-6, 0, 1
        )
    with pytest.raises(AssertionError, match="touched a page beyond an operand"):
        guarded(kernels, 0, pages).C.rms_norm(
            x.data_ptr(), weight.data_ptr(), far.data_ptr() - before, 4 + (not before), 1024, 1024, 1e-6, 0, 1
        )


def test_a_write_inside_the_page_is_caught(kernels, check, pages):
    x, out = check.randn(4, 8, dtype=torch.float32), pages.place(torch.empty(3, 8))
    first = out.data_ptr() - (32 if pages.at_end else 0)
    guarded(kernels, 0, pages).C.rms_norm(x.data_ptr(), x.data_ptr(), first, 4, 8, 8, 1e-6, 0, 1)
    with pytest.raises(AssertionError, match="written beyond an operand"):
        pages.check()
