"""Threads and processes: models called in turn, at once, in a forked child, and with more threads than cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from qwenopt import native
from qwenopt.backend import compile_graph
from qwenopt.testing.decode import make_cache, prompt
from qwenopt.testing.models import tiny_model

LENGTH, STEPS = 7, 12
SECONDS = 180  # what takes longer hangs: these runs take seconds, half a minute on a busy machine


def compiled(name: str, seed: int = 0) -> Any:
    model = tiny_model(name, seed=seed)
    model.compile(backend=compile_graph, fullgraph=True, options={"lowering": "direct"})
    return model


class Decode:
    """A greedy decode by single steps, with a cache of its own; `logits` holds those of each step."""

    def __init__(self, model: Any, seed: int = 0, cache: str = "static") -> None:
        self.model, self.logits = model, list[Tensor]()
        self.given, _ = prompt(model.config, 1, LENGTH, seed=seed)
        self.state = make_cache(cache, model.config, LENGTH + STEPS)

    @torch.no_grad()
    def step(self) -> None:
        self.logits.append(self.model(self.given, past_key_values=self.state).logits[:, -1:])
        self.given = self.logits[-1].argmax(-1)

    def run(self, start: Callable[[], Any] = lambda: None) -> Tensor:
        start()
        for _ in range(STEPS):
            self.step()
        return torch.cat(self.logits, 1)


def test_two_models_called_in_turn_keep_their_numbers() -> None:
    models = [compiled("0.6B"), compiled("30B-A3B", 1)]
    alone = [Decode(model).run() for model in models]
    turns = [Decode(model) for model in models]
    for _ in range(STEPS):
        for turn in turns:
            turn.step()
    for turn, wanted in zip(turns, alone, strict=True):
        assert torch.equal(torch.cat(turn.logits, 1), wanted)


def at_once(decodes: list[Decode]) -> list[Tensor]:
    """Each decode in a Python thread of its own, all from one moment on."""
    start, threads = Barrier(len(decodes)), torch.get_num_threads()

    def run(decode: Decode) -> Tensor:
        torch.set_num_threads(threads)  # a setting of each thread
        return decode.run(lambda: start.wait(SECONDS))

    with ThreadPoolExecutor(len(decodes)) as pool:
        return [future.result(SECONDS) for future in [pool.submit(run, d) for d in decodes]]


def test_two_models_called_at_once_keep_their_numbers() -> None:
    models = [compiled("0.6B"), compiled("30B-A3B", 1)]
    alone = [Decode(model).run() for model in models]
    for _ in range(3):
        for found, wanted in zip(at_once([Decode(model) for model in models]), alone, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_one_model_called_from_four_threads_keeps_its_numbers(name: str, cache: str) -> None:
    model = compiled(name)
    alone = [Decode(model, seed, cache).run() for seed in range(4)]
    assert not torch.equal(alone[0], alone[1])
    for _ in range(3):
        for found, wanted in zip(at_once([Decode(model, seed, cache) for seed in range(4)]), alone, strict=True):
            assert torch.equal(found, wanted)


# In processes of their own: one that hangs can be ended, and Dynamo's threads are not forked along.
PROGRAM = """
import os, sys, torch
sys.path.insert(0, {folder!r})
from qwenopt.testing.tolerance import assert_near_eager
from test_threads import Decode, compiled
torch.set_num_threads({threads})
model = compiled({name!r})
wanted = Decode(model).run()
{then}
"""
FORKED = """
child = os.fork()
if child == 0:
    code = 1
    torch.set_num_threads(1)
    try:
        code = 0 if torch.equal(Decode(model).run().argmax(-1), wanted.argmax(-1)) else 3
    finally:
        os._exit(code)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert torch.equal(Decode(model).run(), wanted), "the parent, afterwards"
sys.exit(code)
"""
MORE_THREADS = """
again = Decode(model).run()
assert torch.equal(again, wanted), "twice"
torch.set_num_threads(1)
assert_near_eager(Decode(model).run(), wanted)
"""


def in_a_process(name: str, threads: int, then: str) -> None:
    text = PROGRAM.format(folder=os.path.dirname(__file__), threads=threads, name=name, then=then)
    # A group of its own, so that a child that hangs goes with its parent.
    process = subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        pytest.fail(f"still running after {SECONDS} s")
    assert process.returncode == 0, output[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.skipif(not native.available(), reason=f"no native module: {native.why_not()}")
@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
def test_a_forked_child_gets_the_tokens_of_its_parent(name: str) -> None:
    """On one thread: with more, MKL's cosine waits for OpenMP's threads, which the child lacks, in eager too."""
    in_a_process(name, 2, FORKED)


@pytest.mark.parametrize("name", ["0.6B", "30B-A3B"])
def test_more_threads_than_cores_finish(name: str) -> None:
    in_a_process(name, 2 * (os.cpu_count() or 1), MORE_THREADS)
