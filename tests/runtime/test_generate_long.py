"""qwenopt.generate with long prompts: the tokens of eager, and no more memory than keys and one chunk take."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qwenopt
from qwenopt.testing.decode import one_thread
from qwenopt.testing.models import tiny_model
from qwenopt.testing.replies import prompts_for, wanted

GREEDY: dict[str, Any] = {"temperature": 0, "eos_token_id": ()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_lengths_of_up_to_four_thousand(seed: int) -> None:
    model = tiny_model("0.6B", max_position_embeddings=4096)
    chosen = random.Random(seed)
    lengths = [int(4000 ** chosen.random()) for _ in range(chosen.randint(6, 16))] + [4000]
    prompts = prompts_for(model, lengths, seed=seed)
    prompts.append(prompts[-1][:2000] + prompts[0])  # goes on from the middle of another
    out = qwenopt.generate(model, prompts, max_new_tokens=8, **GREEDY)
    assert out.replies == wanted(model, prompts, 8)
    assert out.timings.shared_tokens >= 1984


def peak_bytes(run: Callable[[], object]) -> int:
    """How far the resident memory of this process rises while `run` runs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    except OSError as error:
        pytest.skip(f"no peak of memory to be had here: {error}")

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    before = status("VmRSS")
    run()
    return status("VmHWM") - before


@pytest.mark.slow
def test_a_prompt_of_32k_takes_the_memory_of_its_keys_and_of_a_chunk() -> None:
    model = tiny_model("0.6B", torch.bfloat16, max_position_embeddings=40960)
    length = 32768
    (prompt,) = prompts_for(model, [length])
    cache = qwenopt.PagedKVCache(
        model.config, max_batch_size=1, num_pages=length // 32 + 1, page_size=32, dtype=model.dtype
    )
    qwenopt.generate(model, [prompt[:600]], max_new_tokens=2, cache=cache, **GREEDY)  # what compiling takes
    cache.reset()
    spent = peak_bytes(lambda: qwenopt.generate(model, [prompt], max_new_tokens=2, cache=cache, **GREEDY))
    # A chunk of 512 takes 2 MB and the allocator's slack. Its scores against all keys, in bfloat16, would be 512 MB;
    # all activations of the whole prompt at once took 76 MB more (2026-11-25).
    assert spent < cache.stats().nbytes + (32 << 20), f"{spent >> 20} MB"
