"""Every kernel on the GPU: checked, then timed beside its floor and beside what torch and transformers have."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from cases import BF16, Case, Work
from torch import Tensor

from bench.gpu.peers import peers
from bench.gpu.timing import again, device_is_lost, each
from qwenopt.ops import OPS

SOURCE = "copy of 1 GiB, product of 8192^3"

# By the numbers of the kernels' plan: G8 products of few rows, G7 and G6 small ones, G1 to G3 experts, G4 attention.
CASES = [
    *(Case("linear", "8B", t, detail=d) for d in ("gate_proj", "down_proj", "q_proj", "lm_head") for t in (1, 8, 16)),
    *(Case(op, "8B", t) for op in ("linear_group", "linear_silu_mul", "linear_add_rms_norm") for t in (1, 8, 16)),
    *(Case("linear_argmax", "8B", t) for t in (1, 16)),
    *(Case("moe_experts", "30B-A3B", t) for t in (1, 8, 64, 512)),
    *(Case("paged_attention", "30B-A3B", rows, detail=f"{rows}x8192-p16") for rows in (16, 1)),
    *(Case("paged_attention", "8B", 16, detail=f"16x8192-{pages}") for pages in ("p64", "p16-int8")),
    *(Case("add_rms_norm", "8B", t) for t in (1, 64)),
    *(Case("qk_norm_rope", "8B", t) for t in (1, 64)),
    *(Case(op, "8B", t, detail="1x1-p16") for op in ("kv_append", "qk_norm_rope_append") for t in (1, 64)),
    Case("qk_norm_rope_static_append", "8B", 1, detail="L4096"),
    *(Case("silu_mul", "8B", t) for t in (1, 64)),
    *(Case("moe_route", "30B-A3B", t) for t in (1, 64)),
    Case("attention", "8B", 1, detail="L4096"),
    Case("attention", "8B", 4096),
    Case("moe_experts", "30B-A3B", 4096),
    Case("linear", "8B", 512, detail="gate_proj"),
    Case("linear", "0.6B", 1, detail="gate_proj"),
    # Last, since Inductor takes its time.
    *(Case("moe_experts", "30B-A3B", t, detail="inductor") for t in (1, 64)),
]


def on_gpu(work: Work) -> Work:
    """The arguments on the GPU; what several sets share stays shared."""
    moved: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(one) for one in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) not in moved:
            moved[id(value)] = value.cuda()
        return moved[id(value)]

    return Work([tuple(move(a) for a in args) for args in work.variants], work.num_bytes, work.flops)


def providers(case: Case, args: tuple[Any, ...]) -> Iterator[tuple[str, Callable[..., Any] | str]]:
    """The kernels of this package, or why one cannot be had. Where `torch` is a provider it is among the peers."""
    for p in OPS[case.op].providers:
        if p.device == "cuda" and p.name != "torch":
            yield p.name, p.available() or p.accepts(*args) or p.fn


def one(case: Case, limits: harness.Limits) -> dict[str, Any]:
    """All implementations of a case, in microseconds a call."""
    work = on_gpu(case.build())
    floor = limits.seconds(work.num_bytes, work.flops, case.dtype)
    found: dict[str, Any] = {"op": case.op, "case": str(case), "floor_us": floor * 1e6, "times": {}, "not": {}}
    for name, fn in (*providers(case, work.variants[0]), *peers(case, work)):
        try:
            if isinstance(fn, str):
                raise RuntimeError(fn)
            if name != "sdpa" and "_mm" not in name:
                harness.check(case.op, fn, work.variants[0])
            seconds, how = each(fn, work.variants)
        except Exception as error:  # one that fails or is wrong has no time, and the others still have theirs
            found["not"][name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]
            continue
        found["times"][name] = {"us": seconds * 1e6, "share": floor / seconds, "by": how}
    return found


def main(out: Path, until: float) -> None:
    """Write part-kernels.json anew after each case, beginning none after `until` (time.time()).

    What there is already is kept: a case that has lost the device to its process is followed by a new process.
    """
    path = out / "part-kernels.json"
    ceilings = json.loads((out / "part-ceilings.json").read_text())
    limits = harness.Limits(ceilings["gbps"], {BF16: ceilings["tflops"] * 1e3}, SOURCE, lambda: ceilings["gbps"])
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for case in CASES[len(rows) :]:
        if time.time() > until:
            rows.append(
                {"op": case.op, "case": str(case), "floor_us": 0.0, "times": {}, "not": {"all": "no time left"}}
            )
        else:
            rows.append(one(case, limits))
        print(rows[-1], flush=True)
        path.write_text(json.dumps(rows))
        if device_is_lost():
            again("bench.gpu.kernels", str(out), str(until))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), float(sys.argv[2]))
