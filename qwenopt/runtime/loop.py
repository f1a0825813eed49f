"""Loop: the steps of one generation, from the first prompt to the last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwenopt.runtime.mirror import Mirror
from qwenopt.runtime.packed_batch import PackedBatch
from qwenopt.runtime.paged_cache import PagedKVCache
from qwenopt.runtime.sequences import Request, Schedule
from qwenopt.runtime.step import Stepper
from qwenopt.runtime.tail import Choices


@dataclass
class Timings:
    """Where the time of a generation went, in seconds. A step that reads prompts may write replies as well."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    shared_tokens: int = 0  # of prompts, found in the cache instead of computed
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    prefill_steps: int = 0
    decode_steps: int = 0


def lines_for(num_rows: int) -> int:
    """Lines of the batch for that many rows: a power of two, so that few numbers of rows have graphs of their own."""
    return 1 << (num_rows - 1).bit_length()


class Loop:
    """The steps of one generation."""

    def __init__(
        self,
        model: nn.Module,
        cache: PagedKVCache,
        requests: Sequence[Request],
        choices: Choices,
        lines: int,
        stop_ids: Collection[int],
        prefill_tokens: int,
        options: Mapping[str, Any],
        emit: Callable[[int, int], object],
    ) -> None:
        self.schedule, self.choices = Schedule(cache, requests, lines), choices
        self.stop_ids, self.on_token = frozenset(stop_ids), emit
        self.stepper = Stepper(model, choices.tail, options)
        self.prefill = PackedBatch(cache, lines, max(prefill_tokens, lines), dynamic=True)
        self.decode = PackedBatch(cache, lines, lines)
        self.emits = Mirror(torch.zeros(lines, dtype=torch.bool, device=cache.device))
        self.out = torch.zeros(lines, dtype=torch.int64, device=cache.device)
        for t in (self.emits.tensor, self.out):
            torch._dynamo.mark_static_address(t, guard=False)
            torch._dynamo.mark_static(t)
        self.stats: dict[int, Any] = {}  # of thinking, by request
        self.timings = Timings(prompt_tokens=sum(len(r.prompt) for r in requests))

    def run(self, start: float) -> None:
        """Until every request has its reply. Whatever happens, no row is left in the cache."""
        try:
            while self.schedule.waiting or self.schedule.working:
                for line, request in self.schedule.admit():
                    self.timings.shared_tokens += request.done
                    self.choices.begin(line, request.index, request.prompt, request.max_new_tokens)
                self._step(start)
        except BaseException:
            self.schedule.cache.forget()  # the prompts' pages can be found already, and may not have been written
            raise
        finally:
            self.schedule.close()

    def _step(self, start: float) -> None:
        begin = time.perf_counter()
        reading = self.schedule.reading
        batch = self.prefill if reading else self.decode
        pieces = self.schedule.pieces(batch.num_tokens)
        batch.fill(pieces)
        ending = [r is not None and r.left == 0 for r in self.schedule.lines]
        self.emits.write(ending)
        self.stepper(batch, self.emits.tensor, self.out)
        if any(ending):  # else nothing is read back, and the next piece of a prompt is made ready meanwhile
            self._take_all(ending, start)
        spent = time.perf_counter() - begin
        if reading:
            self.timings.prefill_seconds += spent
            self.timings.prefill_steps += 1
        else:
            self.timings.decode_seconds += spent
            self.timings.decode_steps += 1

    def _take_all(self, ending: Sequence[bool], start: float) -> None:
        """The tokens of the rows that are at their ends: what a step waits for the device for."""
        tokens, forcing = self.out.tolist(), self.choices.forcing()
        if not self.timings.new_tokens:
            self.timings.first_token_seconds = time.perf_counter() - start
        for line, token in enumerate(tokens):
            if ending[line]:
                self._take(line, token, forcing[line])

    def _take(self, line: int, token: int, is_forcing: bool) -> None:
        """A drawn token, and what thinking control makes follow it: that is computed in one step, like a prompt."""
        request = self.schedule.lines[line]
        assert request is not None
        new = [token]
        if is_forcing and token not in self.stop_ids:
            new += self.choices.forced(line, request.max_new_tokens - len(request.reply) - 1)
        request.reply += new
        self.timings.new_tokens += len(new)
        if token in self.stop_ids or len(request.reply) == request.max_new_tokens:
            self.stats[request.index] = self.choices.stats(line)
            self.schedule.end(line)
        for one in new:
            self.on_token(request.index, one)
