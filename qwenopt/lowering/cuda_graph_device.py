"""The CUDA graphs of one device: how a call is captured and replayed. The rest of the lowering knows no CUDA."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch


class Recording(Protocol):
    """A captured call: `replay` runs it again on the memory it was captured on; `outputs` is what it returned."""

    outputs: Any

    def replay(self) -> None: ...


class Graphs(Protocol):
    """What captures calls. Tests bring one that needs no GPU."""

    def turn(self) -> Any:
        """A context for everything that touches the memory of graphs: one caller at a time, in order on the device."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run `call` where captures will run, so that nothing is compiled or loaded in one; returns its result."""

    def capture(self, call: Callable[[], Any]) -> Recording:
        """Record `call` without running it. Raises what capturing raises; the call can then still be made."""


class CudaRecording:
    """A call captured as a CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any) -> None:
        self.graph, self.outputs = graph, outputs

    def replay(self) -> None:
        """Start the graph on the current stream."""
        self.graph.replay()


class CudaGraphs:
    """Graphs of one device that share one pool of memory.

    Nothing in the pool is live between two calls, since results are copied out, so that all graphs may use the same
    memory for what they compute on the way. That holds while one runs at a time: `turn`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._last: torch.cuda.Stream | None = None
        self._begin()

    def _begin(self) -> None:
        self._side = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._keeper: torch.cuda.CUDAGraph | None = None

    def _keep(self) -> None:
        """Record an empty graph: a pool ends with its last graph, and cannot be begun again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this one is empty
            self._keeper, _ = self._record(lambda: None)

    def _abandon(self) -> None:
        """Leave pool and stream of a capture that failed, and begin anew.

        torch 2.11 leaves such a capture open where CUDA cannot end it: the allocator goes on serving the stream from
        the pool, and the generator of the device refuses to draw until another capture has ended.
        """
        with suppress(RuntimeError):  # the allocator's, where torch has ended it
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        self._begin()
        with suppress(RuntimeError):  # the next capture, if there is one, says it
            self._keep()

    def _record(self, call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            outputs = call()
        return graph, outputs

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One caller at a time; what the last one started on another stream comes first."""
        with self._lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
            yield

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run `call` on the stream on which captures run."""
        stream = torch.cuda.current_stream()
        self._side.wait_stream(stream)
        with torch.cuda.stream(self._side):
            result = call()
        stream.wait_stream(self._side)
        return result

    def capture(self, call: Callable[[], Any]) -> CudaRecording:
        """Record what `call` starts on the device; other threads may go on with theirs."""
        stream = torch.cuda.current_stream()
        try:
            if self._keeper is None:
                self._keep()
            with _workspaces_inside():
                return CudaRecording(*self._record(call))
        except BaseException:
            torch.cuda.set_stream(stream)  # torch 2.11 stays on the other one when a capture cannot be ended
            self._abandon()
            raise


@contextmanager
def _workspaces_inside() -> Iterator[None]:
    """cuBLAS' workspaces lie in the graph's pool, not in memory that whoever clears them gives to others."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@functools.cache
def graphs_of(device: torch.device) -> CudaGraphs:
    """The graphs of a device: one pool for all models on it."""
    return CudaGraphs(device)
