"""llama.cpp, by the low-level interface of llama-cpp-python, built from source for this processor."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path
from typing import Any

from bench.peers import dressed, install, versions
from bench.peers.peer import Engine, Peer, Place, Timing

# Its build, but for this processor (as llama.cpp itself does by default), is left as it comes; programs are not needed.
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF " + " ".join(
    f"-DLLAMA_BUILD_{part}=OFF" for part in ("TOOLS", "EXAMPLES", "TESTS", "SERVER")
)
SEQUENCE_TOKENS = 1024  # a context's room for each sequence


class LlamaCpp(Peer):
    """On a GGUF file in bfloat16 that llama.cpp's own converter made."""

    name = "llama.cpp"
    pins = (*versions.LLAMA_CPP, *versions.LLAMA_CPP_CONVERTER)
    packages = ("llama-cpp-python",)
    memory = 2.2

    def install(self, place: Place) -> None:
        """The source distribution is unpacked and kept, because the converter is in it and not in what it installs."""
        source = place.root / "source"
        (requirement,) = versions.LLAMA_CPP
        install.pip(place, "download", "--no-deps", "--no-binary=:all:", f"--dest={source}", requirement)
        (archive,) = source.glob(f"*{requirement.rpartition('=')[2]}.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(source, filter="data")
        folder = source / archive.name.removesuffix(".tar.gz")
        install.pip(place, "install", str(folder), environment={"CMAKE_ARGS": CMAKE_ARGS})
        install.pip(place, "install", *versions.LLAMA_CPP_CONVERTER)

    def prepare(self, place: Place, checkpoint: Path) -> Path:
        made = place.models / f"{checkpoint.name}-bf16.gguf"
        if not made.is_file():
            place.models.mkdir(parents=True, exist_ok=True)
            (script,) = place.root.glob("source/*/vendor/llama.cpp/convert_hf_to_gguf.py")
            whole = dressed.dress(checkpoint, place.root.parent / "checkpoints")
            partial = made.with_suffix(".partial")
            options = ["--outtype", "bf16", "--outfile", str(partial)]
            install.run(place, [str(place.python), str(script), *options, str(whole)])
            partial.rename(made)
        return made

    def load(self, model: Path, threads: int) -> Engine:
        return LlamaCppEngine(model, threads)


class LlamaCppEngine:
    """One loaded model and a context for each number of sequences; all other settings are llama.cpp's defaults."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._lib, self._threads = llama_cpp, threads
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[int, Any] = {}
        self._batch = llama_cpp.llama_batch_init(SEQUENCE_TOKENS, 0, 1)

    def prefill(self, prompt: list[int]) -> Timing:
        context = self._context(1)
        begin = time.perf_counter()
        following = self._decode(context, [prompt], 0)
        return Timing(time.perf_counter() - begin, following)

    def decode(self, prompts: list[list[int]], steps: int) -> Timing:
        context = self._context(len(prompts))
        first = tokens = self._decode(context, prompts, 0)
        length = len(prompts[0])
        begin = time.perf_counter()
        for i in range(steps):
            tokens = self._decode(context, [[token] for token in tokens], length + i)
        return Timing(time.perf_counter() - begin, first)

    def _context(self, sequences: int) -> Any:
        """A context of so many sequences, emptied."""
        lib = self._lib
        if sequences not in self._contexts:
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = SEQUENCE_TOKENS * sequences, sequences
            params.n_threads = params.n_threads_batch = self._threads
            self._contexts[sequences] = lib.llama_init_from_model(self._model, params)
        context = self._contexts[sequences]
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        return context

    def _decode(self, context: Any, rows: list[list[int]], position: int) -> list[int]:
        """Run one batch with the next tokens of every sequence; returns the most likely token after each."""
        batch = self._batch
        lasts, n = [], 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                batch.token[n], batch.pos[n] = token, position + offset
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.logits[n] = offset == len(row) - 1
                n += 1
            lasts.append(n - 1)
        batch.n_tokens = n
        status = self._lib.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._argmax(context, last) for last in lasts]

    def _argmax(self, context: Any, row: int) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
