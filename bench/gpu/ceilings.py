"""The two ceilings that everything is set in relation to, and the time of a launch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bench.gpu.timing import each, elapsed

COPY_BYTES = 1 << 30
PEAK_SIZE = 8192


def measure() -> dict[str, float]:
    """gbps: read and written by a copy of 1 GiB; tflops: a bfloat16 product of 8192^3; launch_us: an empty kernel."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    copied = elapsed(lambda: target.copy_(source))
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.mm(a, b)
    product = elapsed(lambda: torch.mm(a, b, out=out))
    one = torch.zeros(1, device="cuda")
    launch, _ = each(lambda x: x.add_(1), [(one,)], at_least=1000)
    return {
        "gbps": 2 * COPY_BYTES / copied / 1e9,
        "tflops": 2 * PEAK_SIZE**3 / product / 1e12,
        "launch_us": launch * 1e6,
    }


if __name__ == "__main__":
    found = measure()
    (Path(sys.argv[1]) / "part-ceilings.json").write_text(json.dumps(found))
    print(found)
