"""Step: one call of the model on packed rows and the choice of the next tokens, compiled into one graph.

Dynamo's guards and transformers' wrappers cost a call some 2 ms at 28 layers, as much as 4 % of a decode step of the
0.6B model (`bench/bench_generate.py`). A step goes through them once for each batch, then calls what they led to
directly: within one generation nobody else changes the model or the cache. The decoding batch need not go through them
at all where a step has read a prompt before: it is the same function on other tensors (`rebound.py`).
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

from qwenopt.errors import QwenoptError
from qwenopt.report import last_report
from qwenopt.runtime.packed_batch import PackedBatch
from qwenopt.runtime.rebound import Call, known_inputs
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
    """What a compiled call came down to: the function that the backend made, and what it was called with.

    `known` is what Dynamo knew of that, where the function takes other sizes as well; else None.
    """

    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    known: tuple[Any, ...] | None = None

    def bound(self) -> Callable[[], Any] | None:
        """The same call again, on tensors that stay where they are."""
        return self._on(self.args)

    def bound_to(self, others: Mapping[int, Tensor]) -> Callable[[], Any] | None:
        """The same with `others` in the place of tensors, by their ids; None where the function does not take them."""
        args = None if self.known is None else Call(self.args, self.known).with_instead(others)
        return None if args is None else self._on(args)

    def _on(self, args: tuple[Any, ...]) -> Callable[[], Any] | None:
        if self.function is None:
            return None
        # A function that captures itself need not look anew at each step where hundreds of weights lie.
        fixed = getattr(self.function, "fixed", None)
        return partial(self.function, *args) if fixed is None else fixed(args)


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
        known: tuple[Any, ...] | None = known_inputs(gm)
        function = backend(gm, inputs, options=self._options)
        if last_report().graphs[-1].lowering != "direct":
            known = None

        def call(*args: Any) -> Any:
            self._direct = Direct(function, args, known)
            return function(*args)

        return call

    def __call__(self, *args: Any) -> Direct:
        """Run one step through Dynamo; returns how the same can be called again on the same objects.

        Raises QwenoptError for a model that is not captured as one graph.
        """
        try:
            self._compiled(*args)
        except torch._dynamo.exc.Unsupported as error:
            raise QwenoptError(_not_captured(args[0], error)) from error
        direct, self._direct = self._direct, Direct()
        return direct


def _not_captured(model: Any, error: Exception) -> str:
    import transformers

    told = str(error).strip().splitlines()[0].rstrip(".")
    text = f"generate: Dynamo does not capture a step of {type(model).__name__} as one graph: {told}"
    if getattr(model.config, "num_experts", 0):
        text += f"; experts are captured from transformers 5.15 on, {transformers.__version__} is installed"
    return f"{text}. model.generate() takes models whose graph breaks"


_COMPILED: WeakKeyDictionary[nn.Module, dict[Any, CompiledStep]] = WeakKeyDictionary()


class Stepper:
    """Runs the steps of one generation: the first of each batch with all guards, the others directly."""

    def __init__(self, model: nn.Module, tail: Tail, options: Mapping[str, Any]) -> None:
        self.model, self.tail, self.options = model, tail, dict(options)
        if next(model.parameters()).device.type == "cuda" and not self.options.keys() & {"mode", "lowering"}:
            self.options["mode"] = "reduce-overhead"  # every step of a batch is the same call on the same memory
        self._direct: dict[PackedBatch, Callable[[], Any]] = {}
        self._any_size: tuple[dict[str, int], Direct] | None = None

    def __call__(self, batch: PackedBatch, emit: Tensor, out: Tensor) -> None:
        """Run `packed_step`. `batch`, `emit` and `out` must be the same objects in every call for a batch."""
        again = self._direct.get(batch)
        if again is not None:
            again()
            return
        if (again := self._rebound(batch)) is not None:
            self._direct[batch] = again
            again()
            return
        direct = self._compiled(batch)(self.model, batch, self.tail, emit, out)
        if batch.dynamic:  # its tensors are others in each call
            self._any_size = {name: id(t) for name, t in batch.places.tensors().items()}, direct
        elif (again := direct.bound()) is not None:
            self._direct[batch] = again

    def _rebound(self, batch: PackedBatch) -> Callable[[], Any] | None:
        """The call of a batch of one size by what was compiled for one of any size, if a step of that came before."""
        if batch.dynamic or self._any_size is None:
            return None
        names, direct = self._any_size
        return direct.bound_to({names[name]: t for name, t in batch.places.tensors().items()})

    def _compiled(self, batch: PackedBatch) -> CompiledStep:
        known = _COMPILED.setdefault(self.model, {})
        shape = (batch.num_rows, 0 if batch.dynamic else batch.num_tokens, repr(sorted(self.options.items())))
        key = (*shape, self.tail.kind)
        if key not in known:
            known[key] = CompiledStep(self.options)
        return known[key]
