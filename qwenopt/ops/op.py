"""Op: one operation as a PyTorch reference plus the kernels (providers) that may stand in for it.

The reference is written once and serves as schema, fake implementation, fallback, test oracle and benchmark baseline.
A provider is a kernel behind an overload of the same schema (`qwenopt::silu_mul.cpu`); three separate questions decide
whether it runs: is the machine able (`available`), do these arguments fit (`accepts`), and is it preferred (the order
of registration). Registration goes through `torch.library.Library.define/impl`, which costs 1-5 us a call where
`torch.library.custom_op` costs 5-16.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.library import Library, infer_schema

NAMESPACE = "qwenopt"
LIB = Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Provider:
    """A kernel for an op on one device type.

    `available()` says why the machine cannot run it (None: it can), `accepts(*args)` why these arguments do not fit
    (None: they do; the arguments may be fake tensors). `record(steps, *args)` records the call for a plan instead of
    making it, on arrays instead of tensors (`qwenopt.ops.steps`); None where the kernel has no place in a plan.
    """

    name: str
    device: str
    fn: Callable[..., Any]
    available: Callable[[], str | None]
    accepts: Callable[..., str | None]
    overload: Any
    record: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Choice:
    """What `Op.choose` decided: a provider, or None with the reasons why each one was passed over."""

    provider: Provider | None
    reason: str = ""


@dataclass
class Op:
    """An operation `qwenopt::<name>` made from its reference function.

    `check(*args)` raises on arguments whose shapes do not fit, with their values; the reference calls it too. Kernels
    read raw memory, so it stands before every way to one but the direct plan, whose graph was checked on fake tensors.
    `fake` replaces the reference under fake tensors: where that is much to trace, or `opaque`, a reference that depends
    on data and cannot be traced at all. `mutates` names the arguments that the op writes to; it must not be given two
    that share memory.
    """

    reference: Callable[..., Any]
    check: Callable[..., None] | None = None
    fake: Callable[..., Any] | None = None
    opaque: bool = False
    mutates: tuple[str, ...] = ()
    providers: list[Provider] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.reference.__name__
        self.schema: str = infer_schema(self.reference, mutates_args=self.mutates)
        self.signature = inspect.signature(self.reference)
        self.default = self._define("", self.reference, "CompositeExplicitAutograd")

    def _define(self, overload: str, fn: Callable[..., Any], key: str) -> Any:
        qualified = f"{self.name}.{overload}" if overload else self.name
        LIB.define(qualified + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIB.impl(qualified, fn, key)
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", self.fake or self.reference, lib=LIB)
        return getattr(getattr(getattr(torch.ops, NAMESPACE), self.name), overload or "default")

    def provider(
        self,
        name: str,
        device: str,
        *,
        available: Callable[[], str | None],
        accepts: Callable[..., str | None],
        record: Callable[..., Any] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as a kernel; registration order is preference."""

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            if list(inspect.signature(fn).parameters) != list(self.signature.parameters):
                raise TypeError(
                    f"{self.name}.{name}: the provider takes {inspect.signature(fn)}, the reference {self.signature}"
                )
            overload = self._define(name, self._checked(fn), device.upper())
            self.providers.append(Provider(name, device, fn, available, accepts, overload, record))
            return fn

        return register

    def _checked(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        check = self.check
        if check is None:
            return fn

        def checked(*args: Any) -> Any:
            check(*args)
            return fn(*args)

        return checked

    def choose(self, args: Sequence[Any]) -> Choice:
        """The first provider that can run on this machine with these (fake) arguments, or the reasons against each."""
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        reasons = []
        for p in self.providers:
            if p.device != device:
                continue
            reason = p.available() or p.accepts(*args)
            if reason is None:
                return Choice(p)
            reasons.append(f"{p.name}: {reason}")
        return Choice(None, "; ".join(reasons) or f"no provider for device {device}")

    def kernel(self, *args: Any) -> Callable[..., Any]:
        """What a call with these arguments runs: checked and chosen once for many calls on tensors of their kinds."""
        if self.check is not None:
            self.check(*args)
        provider = self.choose(args).provider
        return provider.fn if provider is not None else self.reference

    def __call__(self, *args: Any) -> Any:
        """Run the best provider for these arguments, else the reference. Raises if their shapes do not fit."""
        return self.kernel(*args)(*args)


def call(op: Op, *args: Any) -> Any:
    """The op itself in a graph that is being traced, its best kernel outside of one."""
    return op.default(*args) if torch.compiler.is_compiling() else op(*args)
