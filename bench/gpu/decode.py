"""Decoding a full-size model with random weights, made on the GPU: this backend beside Inductor, and `generate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qwenopt
from bench.gpu.floors import share
from bench.gpu.timing import again, device_is_lost, elapsed
from qwenopt.testing.models import SHAPES, full_config

PROMPT, STEPS, WARM = 128, 48, 4
ROOM = 512  # of the static cache


def make(model: str) -> Any:
    """The model in bfloat16 on the GPU; its numbers mean nothing."""
    from transformers import AutoModelForCausalLM

    config = full_config(model, dtype=torch.bfloat16)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def step_seconds(model: Any, forward: Callable[..., Any]) -> dict[str, Any]:
    """A decode step of one row over transformers' static cache, the token fed back on the device."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device="cuda")
    start = time.perf_counter()
    token = model.forward(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

    def step() -> None:
        token.copy_(forward(token, past_key_values=cache).logits[:, -1:].argmax(-1))

    for _ in range(WARM):
        step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    seconds = elapsed(lambda: [step() for _ in range(STEPS)], rounds=3) / STEPS
    return {"seconds": seconds, "first_calls_seconds": first}


def ours(model: Any) -> dict[str, Any]:
    """Through `model.forward` compiled by this backend."""
    compiled = torch.compile(model.forward, backend="qwenopt", mode="reduce-overhead", fullgraph=True)
    found = step_seconds(model, compiled)
    graph = qwenopt.last_report().graphs[-1]
    captures = graph.captures
    return found | {"lowering": graph.lowering, "reason": graph.reason, "graphs": str(captures and captures.line())}


def generated(model: Any) -> dict[str, Any]:
    """Through `qwenopt.generate`, the host's part and the reading of each token included.

    Each call captures its steps anew: what STEPS more of them take is what the longer of two calls takes longer.
    """
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device="cuda")

    def seconds(steps: int) -> float:
        out = qwenopt.generate(model, ids, max_new_tokens=steps, temperature=0.0, eos_token_id=())
        return float(out.timings.decode_seconds)

    seconds(WARM + 1)
    return {"seconds": (seconds(2 * STEPS + WARM) - seconds(STEPS + WARM)) / STEPS}


def by_inductor(model: Any) -> dict[str, Any]:
    """Through Inductor's reduce-overhead; experts as transformers decodes them there."""
    if getattr(model.config, "num_experts", 0):
        model.set_experts_implementation("batched_mm")
    torch.compiler.reset()
    return step_seconds(model, torch.compile(model.forward, mode="reduce-overhead", fullgraph=True))


def main(out: Path, name: str) -> None:
    """Write part-decode-<model>.json anew after each contender; those that are in it already are not run again."""
    gbps = json.loads((out / "part-ceilings.json").read_text())["gbps"]
    path = out / f"part-decode-{name}.json"
    found: dict[str, Any] = {"model": name, "floor_seconds": 0.0, "runs": {}, "not": {}}
    found["floor_seconds"] = share(name, 1, PROMPT, 1.0, gbps)
    if path.exists():  # of a process that a contender took the device from
        found = json.loads(path.read_text())
    path.write_text(json.dumps(found))
    start = time.perf_counter()
    model = make(name)
    if SHAPES[name].is_moe:
        model.set_experts_implementation("grouped_mm")
    torch.cuda.synchronize()
    found["made_seconds"] = time.perf_counter() - start
    for contender, measure in (("qwenopt", ours), ("qwenopt.generate", generated), ("inductor", by_inductor)):
        if contender in found["runs"] or contender in found["not"]:
            continue
        try:
            run = measure(model)
            run["tokens_per_second"], run["share"] = 1 / run["seconds"], share(name, 1, PROMPT, run["seconds"], gbps)
            found["runs"][contender] = run
        except Exception as error:  # the others still have theirs
            found["not"][contender] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
        print(contender, found["runs"].get(contender), found["not"].get(contender), flush=True)
        path.write_text(json.dumps(found))
        if device_is_lost():
            again("bench.gpu.decode", str(out), name)


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), sys.argv[2])
