"""The native kernels as functions of tensors, and the bounds that their errors must keep, as fixtures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenopt import native

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if native.available():
        return
    skip = pytest.mark.skip(reason=f"no native module: {native.why_not()}")
    for item in items:
        if "/tests/native/" in str(item.path) and "without_module" not in item.name:
            item.add_marker(skip)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    isas = native.isas() if native.available() else ["generic"]
    if {"isa", "dtype"} <= set(metafunc.fixturenames):
        pairs = [(isa, d) for isa in isas for d in DTYPES if d != "fp16" or wants_float16(metafunc, isa == isas[-1])]
        ids = ["-".join(pair) for pair in pairs]
        metafunc.parametrize(("isa", "dtype"), [(isas.index(isa), DTYPES[d]) for isa, d in pairs], ids=ids)
    elif "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", range(len(isas)), ids=isas)
    elif "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def wants_float16(metafunc: pytest.Metafunc, best: bool) -> bool:
    """float16 differs by its loads and stores alone, which short tests see on every set; of long ones one is enough."""
    if "pages" in metafunc.fixturenames:  # each call is a process
        return False
    return best or not metafunc.module.__name__.endswith("attention")


def code(dtype: torch.dtype) -> int:
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]


class Kernels:
    """`qwenopt._C` called with tensors. Outputs are poisoned first, so that an element left out shows."""

    def __init__(self, isa: int = -1, threads: int = 2):
        self.C, self.isa, self.threads = native.C(), isa, threads

    def on(self, isa: int) -> Kernels:
        return Kernels(isa, self.threads)

    @property
    def last(self) -> tuple[int, int]:
        return self.threads, self.isa

    @staticmethod
    def code(dtype: torch.dtype) -> int:
        return code(dtype)

    @staticmethod
    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan if dtype.is_floating_point else -7, dtype=dtype)

    @staticmethod
    def scratch(size: int) -> Tensor:
        return torch.full((size + 64,), 0xFF, dtype=torch.uint8)  # as floats: NaN

    @staticmethod
    def keep(scratch: Tensor, size: int) -> None:
        assert (scratch[size:] == 0xFF).all(), "written past the end of the scratch"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        (m, k), n = x.shape, weight.shape[0]
        out = self.empty(m, n + 3, dtype=x.dtype)
        size = self.C.linear_scratch_bytes(m, n, k, code(x.dtype), *self.last)
        scratch = self.scratch(size)
        self.C.linear(
            x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
            scratch.data_ptr(), m, n, k, x.stride(0), weight.stride(0), out.stride(0), code(x.dtype), *self.last,
        )  # fmt: skip
        self.keep(scratch, size)
        assert out[:, n:].isnan().all(), "written past the end of a row"
        return out[:, :n]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = self.empty(*x.shape, dtype=x.dtype)
        self.C.rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, x.stride(0), eps, code(x.dtype), *self.last
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, total = self.empty(*x.shape, dtype=x.dtype), self.empty(*x.shape, dtype=x.dtype)
        self.C.add_rms_norm(
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr(), *x.shape,
            x.stride(0), residual.stride(0), eps, code(x.dtype), *self.last,
        )  # fmt: skip
        return out, total

    def qk_norm_rope(
        self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        q_out, k_out = self.empty(*q.shape, dtype=q.dtype), self.empty(*k.shape, dtype=q.dtype)
        b, s, h, d = q.shape
        cos_sb = 0 if cos.shape[0] == 1 else cos.stride(0)
        self.C.qk_norm_rope(
            q.data_ptr(), k.data_ptr(), q_weight.data_ptr(), k_weight.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            q_out.data_ptr(), k_out.data_ptr(), b, s, h, k.shape[2], d, *q.stride()[:3], *k.stride()[:3],
            cos_sb, cos.stride(1), eps, code(q.dtype), *self.last,
        )  # fmt: skip
        return q_out, k_out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        out = self.empty(*gate.shape, dtype=gate.dtype)
        self.C.silu_mul(
            gate.data_ptr(), up.data_ptr(), out.data_ptr(), *gate.shape, gate.stride(0), up.stride(0),
            code(gate.dtype), *self.last,
        )  # fmt: skip
        return out

    def moe_route(self, logits: Tensor, top_k: int, norm: bool) -> tuple[Tensor, Tensor]:
        t, e = logits.shape
        weights, indices = self.empty(t, top_k, dtype=logits.dtype), self.empty(t, top_k, dtype=torch.int64)
        self.C.moe_route(
            logits.data_ptr(), weights.data_ptr(), indices.data_ptr(), t, e, top_k, logits.stride(0), norm,
            code(logits.dtype), *self.last,
        )  # fmt: skip
        return weights, indices

    def top_tokens(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        r, v = logits.shape
        values, ids = self.empty(r, k, dtype=logits.dtype), self.empty(r, k, dtype=torch.int64)
        size = self.C.top_tokens_scratch_bytes(r, v, k, self.threads)
        scratch = self.scratch(size)
        self.C.top_tokens(
            logits.data_ptr(), values.data_ptr(), ids.data_ptr(), scratch.data_ptr(), r, v, k, logits.stride(0),
            code(logits.dtype), *self.last,
        )  # fmt: skip
        self.keep(scratch, size)
        return values, ids

    def logit_signals(self, logits: Tensor, end: int, entropy: bool) -> Tensor:
        r, v = logits.shape
        out, size = self.empty(r, 2, dtype=torch.float32), self.C.logit_signals_scratch_bytes(r, v)
        scratch = self.scratch(size)
        self.C.logit_signals(
            logits.data_ptr(), out.data_ptr(), scratch.data_ptr(), r, v, end, logits.stride(0), entropy,
            code(logits.dtype), *self.last,
        )  # fmt: skip
        self.keep(scratch, size)
        return out

    def moe_experts(self, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        (t, n), (e, two_i, _), k = x.shape, gate_up.shape, indices.shape[1]
        out = self.empty(t, n, dtype=x.dtype)
        size = self.C.moe_experts_scratch_bytes(t, n, two_i // 2, e, k, code(x.dtype), self.threads)
        scratch = self.scratch(size)
        self.C.moe_experts(
            x.data_ptr(), indices.data_ptr(), weights.data_ptr(), gate_up.data_ptr(), down.data_ptr(), out.data_ptr(),
            scratch.data_ptr(), t, n, two_i // 2, e, k, x.stride(0), code(x.dtype), *self.last,
        )  # fmt: skip
        self.keep(scratch, size)
        return out

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        (b, h, s, d), (_, g, length, _) = q.shape, k.shape
        out = self.empty(b, s, h, d, dtype=q.dtype)
        size = self.C.attention_scratch_bytes(b, h, g, s, length, d, self.threads)
        scratch = self.scratch(size)
        kind = 0 if mask is None else MASK_KINDS[mask.dtype]
        strides = (0, 0, 0, 0) if mask is None else mask.expand(b, h, s, length).stride()
        self.C.attention(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if mask is None else mask.data_ptr(),
            0 if positions is None else positions.data_ptr(), out.data_ptr(), scratch.data_ptr(),
            b, h, g, s, length, d, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, kind, is_causal,
            d**-0.5 if scale is None else scale, code(q.dtype), *self.last,
        )  # fmt: skip
        self.keep(scratch, size)
        return out.transpose(1, 2)

    def kv_append(
        self, pools: tuple[Tensor, Tensor, Tensor | None, Tensor | None], k: Tensor, v: Tensor, slots: Tensor
    ) -> None:
        (b, g, s, d), (pages, _, page_size, _) = k.shape, pools[0].shape
        kind = 3 if pools[0].dtype == torch.int8 else code(pools[0].dtype)
        strides = [n for t in (pools[0], pools[1], k, v) for n in t.stride()[:3]]
        addresses = [0 if t is None else t.data_ptr() for t in (*pools, k, v, slots)]
        self.C.kv_append(*addresses, b, g, s, d, pages, page_size, *strides, kind, code(k.dtype), *self.last)

    def paged_attention(
        self,
        q: Tensor,
        pools: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        table: Tensor,
        q_starts: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        window: int = 0,
    ) -> Tensor:
        (b, h, s, d), (pages, g, page_size, _), (rows, width) = q.shape, pools[0].shape, table.shape
        out = self.empty(b, s, h, d, dtype=q.dtype)
        sizes = (b, h, g, s, rows, width, page_size, d)
        size = self.C.paged_attention_scratch_bytes(*sizes, q_starts is not None, self.threads)
        scratch = self.scratch(size)
        kind = 0 if mask is None else MASK_KINDS[mask.dtype]
        strides = (0, 0, 0, 0) if mask is None else mask.expand(b, h, s, width * page_size).stride()
        tensors = (q, *pools, table, q_starts, positions, mask, out, scratch)
        self.C.paged_attention(
            *(0 if t is None else t.data_ptr() for t in tensors), b, h, g, s, rows, width, pages, page_size, d,
            *q.stride()[:3], *pools[0].stride()[:3], *pools[1].stride()[:3], table.stride(0), *strides, kind, window,
            d**-0.5, code(q.dtype), *self.last,
        )  # fmt: skip
        self.keep(scratch, size)
        return out.transpose(1, 2)


class Check:
    """Bounds that follow from the dtype and the length of a sum, not from what a kernel happens to do."""

    @staticmethod
    def randn(*shape: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Normal numbers; with an offset the data starts that many elements past an aligned address."""
        count = torch.Size(shape).numel()
        return torch.randn(count + offset).to(dtype)[offset:].view(shape)

    @staticmethod
    def unit(dtype: torch.dtype) -> float:
        """Largest relative error of one rounding."""
        return torch.finfo(dtype).eps / 2

    def dot_close(
        self, actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int, roundings: float = 1, extra: float = 0
    ) -> None:
        """`actual` is a sum of `terms` products in fp32, in any order, rounded `roundings` times to its dtype.

        `magnitude` is the sum of the products' absolute values. The factor 2 is for products rounded before they are
        added (VDPBF16PS adds pairs). `extra` is a further error relative to the magnitude.
        """
        bound = (2 * (terms + 4) * self.unit(torch.float32) + extra) * magnitude.double()
        size = (exact.abs() + bound).clamp_min(torch.finfo(actual.dtype).tiny)  # below it steps get no smaller
        bound = bound + roundings * self.unit(actual.dtype) * size * 1.01 + 1e-37
        assert not actual.isnan().any(), "NaN in the output"
        worst = ((actual.double() - exact).abs() / bound).max().item() if actual.numel() else 0.0
        assert worst <= 1, f"the error is {worst:.2f} times what {actual.dtype} and {terms} terms allow"

    def rarely_apart(self, actual: Tensor, expected: Tensor, units: float) -> None:
        """Equal but where two fp32 results, `units` of their last digits apart, lie on two sides of a rounding.

        A sum of n terms in two orders is some sqrt(n) units apart. A wrong order of casts shows in a quarter and more.
        """
        assert actual.dtype == expected.dtype
        share = (actual != expected).float().mean()
        assert share <= units * self.unit(torch.float32) / self.unit(actual.dtype), f"{share:.2g} of all differ"

    @staticmethod
    def same_bits(a: Tensor, b: Tensor) -> None:
        kind = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
        assert torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))

    @staticmethod
    def ulps(actual: Tensor, expected: Tensor) -> int:
        """Largest distance in representable numbers of the dtype."""
        kind = {4: torch.int32, 2: torch.int16}[actual.element_size()]

        def order(x: Tensor) -> Tensor:
            bits = x.contiguous().view(kind).long()
            return torch.where(bits < 0, -(bits & (0x7FFFFFFF if kind == torch.int32 else 0x7FFF)), bits)

        assert torch.equal(actual.isnan(), expected.isnan())
        keep = ~actual.isnan()
        return int((order(actual) - order(expected))[keep].abs().max()) if keep.any() else 0


@pytest.fixture
def kernels() -> Kernels:
    return Kernels()


@pytest.fixture
def check() -> Check:
    return Check()
