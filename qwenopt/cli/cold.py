"""Time from the first call to the first token, cold: in a process of its own, with empty compile caches.

`python -m qwenopt.cli.cold FOLDER BACKEND DTYPE THREADS` prints one JSON line; `measure` runs that and reads it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qwenopt.errors import QwenoptError

PROMPT_TOKENS = 32
TAIL_CHARACTERS = 2000


def measure(folder: Path, backend: str, dtype: str, threads: int) -> dict[str, Any]:
    """Load the checkpoint in a fresh process, compile it with `backend` and take the time to its first tokens.

    Returns `first_token_seconds` and `second_token_seconds` from the call that compiles (loading is not counted; the
    second token needs the decode graph, too) and `peak_memory_bytes` of the process.
    """
    with tempfile.TemporaryDirectory(prefix="qwenopt-cold-") as caches:
        # The caches of torch and Triton that would let a later run skip work.
        empty = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
        command = [sys.executable, "-m", "qwenopt.cli.cold", str(folder), backend, dtype, str(threads)]
        done = subprocess.run(command, env=os.environ | empty, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = done.stderr.strip()[-TAIL_CHARACTERS:]
        raise QwenoptError(f"the cold run of {backend} ended with exit status {done.returncode}: {tail}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(folder: Path, backend: str, dtype: str, threads: int) -> dict[str, Any]:
    """What `measure` starts: one cold run in this process."""
    import resource

    import torch

    import qwenopt
    from qwenopt.cli import checkpoint, stream

    torch.set_num_threads(threads)
    model = checkpoint.load(folder, dtype)
    cache = stream.static_cache(model, PROMPT_TOKENS + 2)
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    times = []
    start = time.perf_counter()
    if backend == "qwenopt":
        qwenopt.compile(model)
    elif backend != "eager":
        model.compile(backend=backend)
    with torch.no_grad():
        for _ in range(2):
            ids = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            ids.item()
            times.append(time.perf_counter() - start)
    return {
        "first_token_seconds": times[0],
        "second_token_seconds": times[1],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))), flush=True)
