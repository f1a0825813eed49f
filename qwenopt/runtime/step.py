"""Step: one call of the model on packed rows and the choice of the next tokens, compiled into one graph.

Dynamo's guards and transformers' wrappers cost a call some 2 ms at 28 layers, as much as 4 % of a decode step of the
0.6B model (`bench/bench_generate.py`). A step goes through them once for each batch, then calls what they led to
directly: within one generation nobody else changes the model or the cache.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qwenopt.runtime.packed_batch import PackedBatch
from qwenopt.runtime.tail import Tail


def packed_step(model: Any, batch: PackedBatch, tail: Tail, emit: Tensor, out: Tensor) -> None:
    """Compute the batch's tokens and write each row's next token to `out` (int64 [rows]).

    emit (bool [rows]): the rows that are at the end of what is known of them; what the others get means nothing.
    """
    places = batch.places
    given: dict[str, Any] = {
        "input_ids": places.ids[None],
        "position_ids": places.positions[None],
        "attention_mask": batch.masks(),
        "past_key_values": batch,
        "use_cache": True,
    }
    if not tail.reads_hidden:
        logits = model.forward(**given, logits_to_keep=0 if batch.one_each else places.last).logits
        out.copy_(tail(logits[0], emit))
        return
    # What the model's own forward does, taken apart: it returns what lm_head is given only with that of every layer.
    hidden = model.model(**given).last_hidden_state[0]
    hidden = hidden if batch.one_each else hidden[places.last]
    out.copy_(tail(model.lm_head(hidden), emit, hidden))


@dataclass
class Direct:
    """What a compiled call came down to: the function that the backend made, and what it was called with."""

    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()

    def bound(self) -> Callable[[], Any] | None:
        """The same call again, on tensors that stay where they are."""
        if self.function is None:
            return None
        # A function that captures itself need not look anew at each step where hundreds of weights lie.
        fixed = getattr(self.function, "fixed", None)
        return partial(self.function, *self.args) if fixed is None else fixed(self.args)


def _reset() -> None:
    from torch._dynamo.backends.registry import lookup_backend

    backend: Any = lookup_backend("qwenopt")
    backend.reset()


class CompiledStep:
    """`packed_step` compiled by this backend for one shape of batch and one kind of tail."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._direct = Direct()
        # A code object of its own: Dynamo counts recompilations by code object and refuses a ninth graph of one.
        code = packed_step.__code__.replace()
        step = types.FunctionType(code, packed_step.__globals__, packed_step.__name__)

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            return self._backend(gm, inputs)

        backend.reset = _reset  # type: ignore[attr-defined]  # torch.compiler.reset() asks the backend that it was given
        self._compiled = torch.compile(step, backend=backend, fullgraph=True)

    def _backend(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.registry import lookup_backend

        backend: Callable[..., Any] = lookup_backend("qwenopt")
        function = backend(gm, inputs, options=self._options)

        def call(*args: Any) -> Any:
            self._direct = Direct(function, args)
            return function(*args)

        return call

    def __call__(self, *args: Any) -> Direct:
        """Run one step through Dynamo; returns how the same can be called again on the same objects."""
        self._compiled(*args)
        direct, self._direct = self._direct, Direct()
        return direct


_COMPILED: WeakKeyDictionary[nn.Module, dict[Any, CompiledStep]] = WeakKeyDictionary()


class Stepper:
    """Runs the steps of one generation: the first of each batch with all guards, the others directly."""

    def __init__(self, model: nn.Module, tail: Tail, options: Mapping[str, Any]) -> None:
        self.model, self.tail, self.options = model, tail, dict(options)
        if next(model.parameters()).device.type == "cuda" and not self.options.keys() & {"mode", "lowering"}:
            self.options["mode"] = "reduce-overhead"  # every step of a batch is the same call on the same memory
        self._direct: dict[PackedBatch, Callable[[], Any]] = {}

    def __call__(self, batch: PackedBatch, emit: Tensor, out: Tensor) -> None:
        """Run `packed_step`. `batch`, `emit` and `out` must be the same objects in every call for a batch."""
        again = self._direct.get(batch)
        if again is not None:
            again()
            return
        again = self._compiled(batch)(self.model, batch, self.tail, emit, out).bound()
        if again is not None and not batch.dynamic:  # its tensors are others in each call
            self._direct[batch] = again

    def _compiled(self, batch: PackedBatch) -> CompiledStep:
        known = _COMPILED.setdefault(self.model, {})
        shape = (batch.num_rows, 0 if batch.dynamic else batch.num_tokens, repr(sorted(self.options.items())))
        key = (*shape, self.tail.kind)
        if key not in known:
            known[key] = CompiledStep(self.options)
        return known[key]
