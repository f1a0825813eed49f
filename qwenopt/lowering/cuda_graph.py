"""a lowered graph on a GPU  ->  a callable that captures itself as CUDA graphs, one for each set of input shapes

What `mode="reduce-overhead"` asks for. A set of shapes and addresses that comes once is run as it is (a cache that
grows gives another set with each token); the second time it runs on buffers, beside the current stream, so that every
kernel is compiled and loaded; the third time it is captured, and from then on replayed. No call runs twice, so what a
call writes is written once.

Inputs stay where they lie or are copied into buffers (cuda_graph_inputs.py). Results are copied out of the graph's
memory: they stay valid, where Inductor's are overwritten by the next call. A result that is a view of an input is that
view of the caller's tensor, as without a graph.

A call that cannot be captured runs as it is, with a warning that says why; nothing that is captured has run, so nothing
is lost. What was done is counted in the report.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qwenopt.graphs import Raised, spelling
from qwenopt.lowering.cuda_graph_device import Graphs, Recording
from qwenopt.lowering.cuda_graph_inputs import Inputs
from qwenopt.lowering.cuda_graph_outputs import Outputs
from qwenopt.ops import KV_RESERVE
from qwenopt.report import Captures

log = logging.getLogger(__name__)

# Graphs kept for one compiled function: a batch has a power of two of rows, so these serve 128 of them.
MOST_GRAPHS = 8
# Captures of one function that were not replayed PAID times: where inputs move all the time, it would spend its time on
# them. Each call of qwenopt.generate brings buffers of its own, which pays where it writes more than a few tokens.
MOST_UNPAID = 64
PAID = 32
MOST_SEEN = 64


def why_not(gm: GraphModule, raised: Sequence[Raised]) -> str | None:
    """Why a graph on a GPU must not be captured, or None. To be asked before its raised nodes are bound."""
    if any(r.op is KV_RESERVE for r in raised) or any(n.target is KV_RESERVE.default for n in gm.graph.nodes):
        return "kv_reserve takes pages on the host in each call; qwenopt.generate does that between its steps"
    for node in gm.graph.nodes:
        value = spelling.fake(node)
        if node.op.startswith("call") and isinstance(value, Tensor) and value.device.type == "cpu":
            return f"{node.name} is computed on the CPU; a CUDA graph would hold the value that it had when captured"
        if node.op.startswith("call") and isinstance(value, Tensor) and (read := _of_the_cpu(node)):
            return f"{node.name} reads {read} from the CPU; a CUDA graph would hold the value that it had when captured"
    return None


def _of_the_cpu(node: Node) -> str:
    """The name of a CPU tensor that a node reads; "" for none."""
    fakes = ((n.name, spelling.fake(n)) for n in node.all_input_nodes)
    return next((name for name, fake in fakes if isinstance(fake, Tensor) and fake.device.type == "cpu"), "")


class Captured:
    """The callable: `function(*args)`, captured. `inputs` are from the graph before its nodes were bound."""

    def __init__(self, function: Callable[..., Any], inputs: Inputs, graphs: Graphs, counts: Captures) -> None:
        self.function, self.inputs, self.graphs, self.counts = function, inputs, graphs, counts
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._calls: OrderedDict[Hashable, _Call] = OrderedDict()
        self._unpaid = 0

    def __call__(self, *args: Any) -> Any:
        if self.counts.reason and not self._calls:
            return self._run(args)
        with self.graphs.turn():
            call = self._find(self.inputs.key(args), args)
            if call is None or self.inputs.overlap(args, call.memory):
                return self._run(args)
            if not call.warm:
                return self._warm_up(call, args)
            if call.recording is None and not self._capture(call, args):
                return self._run(args)
            return self._replay(call, args)

    def fixed(self, args: Sequence[Any]) -> Callable[[], Any]:
        """`self(*args)` for callers who know that none of these tensors moves: their key is computed once."""
        key = self.inputs.key(args)

        def again() -> Any:
            call = self._calls.get(key)
            if call is None or call.recording is None or self.inputs.overlap(args, call.memory):
                return self(*args)
            with self.graphs.turn():
                self._calls.move_to_end(key)
                return self._replay(call, args)

        return again

    def _run(self, args: Sequence[Any]) -> Any:
        self.counts.uncaptured += 1
        return self.function(*args)

    def _find(self, key: Hashable, args: Sequence[Any]) -> _Call | None:
        """What is known of this set of inputs; None where it comes for the first time, or nothing more is captured."""
        if key in self._calls:
            self._calls.move_to_end(key)
            return self._calls[key]
        if self.counts.reason:
            return None
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
            return None
        del self._seen[key]
        while len(self._calls) >= MOST_GRAPHS:
            self._calls.popitem(last=False)
            self.counts.evicted += 1
        try:
            self._calls[key] = _Call(self.inputs, args)
        except (RuntimeError, NotImplementedError) as error:  # no memory, or tensors that cannot be copied to
            self._stop(error)
            return None
        return self._calls[key]

    def _warm_up(self, call: _Call, args: Sequence[Any]) -> Any:
        """The second call, on the buffers; its results are its own, as those of any call."""
        self.counts.uncaptured += 1
        call.warm = True
        given = call.given(args)
        results = self.graphs.warm_up(lambda: self.function(*given))
        return Outputs.of(results, given, self.inputs.copied).to_caller(results, args, copy=False)

    def _capture(self, call: _Call, args: Sequence[Any]) -> bool:
        """Capture a call that has been warmed up; whether it can be replayed now."""
        if self._unpaid >= MOST_UNPAID:
            self._stop(
                f"{MOST_UNPAID} graphs were captured and replayed less than {PAID} times each: shapes or addresses of "
                "inputs change all the time"
            )
            return False
        given = call.given(args)
        try:
            call.recording = self.graphs.capture(lambda: self.function(*given))
        except Exception as error:  # of the driver, of torch, of a kernel: the call itself is still to be made
            self._stop(error)
            return False
        call.outputs = Outputs.of(call.recording.outputs, given, (*self.inputs.kept, *self.inputs.copied))
        self.counts.graphs += 1
        self._unpaid += 1
        return True

    def _replay(self, call: _Call, args: Sequence[Any]) -> Any:
        assert call.recording is not None
        assert call.outputs is not None
        call.fill(args)
        call.recording.replay()
        self.counts.replays += 1
        call.replays += 1
        self._unpaid -= call.replays == PAID
        return call.outputs.to_caller(call.recording.outputs, args, copy=True)

    def _stop(self, why: Exception | str) -> None:
        """Capture nothing more; what was captured goes on."""
        self.counts.reason = why if isinstance(why, str) else f"{type(why).__name__}: {str(why).partition(chr(10))[0]}"
        for key in [key for key, call in self._calls.items() if call.recording is None]:
            del self._calls[key]
        self._seen.clear()
        log.warning(
            "qwenopt: no more CUDA graphs are captured, calls start one kernel after another: %s", self.counts.reason
        )


class _Call:
    """One set of input shapes and addresses: buffers for what is copied, and the recording once there is one.

    Raises RuntimeError where a buffer cannot be made or cannot be copied to.
    """

    def __init__(self, inputs: Inputs, args: Sequence[Any]) -> None:
        self.inputs = inputs
        copied = [args[i] for i in inputs.copied]
        self.buffers = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device) for a in copied]
        self._targets = [_once(b) for b in self.buffers]
        self.memory = inputs.written_memory(args)
        self.warm, self.replays = False, 0
        self.recording: Recording | None = None
        self.outputs: Outputs | None = None
        self.fill(args)

    def fill(self, args: Sequence[Any]) -> None:
        """Copy the inputs that are copied."""
        if self._targets:
            torch._foreach_copy_(self._targets, [_once(args[i]) for i in self.inputs.copied])

    def given(self, args: Sequence[Any]) -> list[Any]:
        """The arguments with the buffers, filled, in the places of what is copied."""
        self.fill(args)
        given = list(args)
        for i, buffer in zip(self.inputs.copied, self.buffers, strict=True):
            given[i] = buffer
        return given


def _once(t: Tensor) -> Tensor:
    """Each element of an expanded tensor once, so that it can be copied to."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t
