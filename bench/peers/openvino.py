"""OpenVINO GenAI on a model that optimum-intel exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench.peers import dressed, install, versions
from bench.peers.peer import Engine, Peer, Place, Timing

# It asks for one although `ignore_eos` is set: Qwen's <|im_end|>.
END_TOKEN = 151645


class OpenVino(Peer):
    """Weights, arithmetic and cache in bfloat16; the rest of the pipeline's settings are its defaults.

    Arithmetic is in float32, its own choice, where it does not find bfloat16 among the processor's abilities: told to
    use it all the same, it takes minutes for a prompt.
    """

    name = "openvino"
    pins = versions.OPENVINO
    without = versions.PICTURES_AND_SOUND
    packages = ("openvino", "openvino-genai", "optimum-intel", "torch", "transformers")
    memory = 3.0

    def prepare(self, place: Place, checkpoint: Path) -> Path:
        made = place.models / f"{checkpoint.name}-bf16"
        if not made.is_dir():
            place.models.mkdir(parents=True, exist_ok=True)
            whole = dressed.dress(checkpoint, place.root.parent / "checkpoints")
            partial = made.with_suffix(".partial")
            command = [str(place.python), "-m", "bench.peers.openvino", str(whole), str(partial)]
            install.run(place, command, cwd=install.ROOT, environment={"HF_HUB_OFFLINE": "1"})
            partial.rename(made)
        return made

    def load(self, model: Path, threads: int) -> Engine:
        import openvino
        import openvino_genai

        abilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if "BF16" in abilities else "f32",
            "KV_CACHE_PRECISION": "bf16",
            "INFERENCE_NUM_THREADS": threads,
        }
        return OpenVinoEngine(openvino_genai.LLMPipeline(str(model), "CPU", **settings))


class OpenVinoEngine:
    """Times are those that the pipeline itself takes, in milliseconds: when each step's tokens came."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def prefill(self, prompt: list[int]) -> Timing:
        result = self._generate([prompt], 1)
        return Timing(result.perf_metrics.get_ttft().mean / 1e3, [row[0] for row in result.tokens])

    def decode(self, prompts: list[list[int]], steps: int) -> Timing:
        result = self._generate(prompts, steps + 1)
        times = result.perf_metrics.raw_metrics.m_new_token_times
        return Timing((times[-1] - times[0]) / 1e3, [row[0] for row in result.tokens])

    def _generate(self, prompts: list[list[int]], count: int) -> Any:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = count, True
        config.set_eos_token_id(END_TOKEN)
        ids = openvino.Tensor(np.array(prompts, dtype=np.int64))
        mask = openvino.Tensor(np.ones((len(prompts), len(prompts[0])), dtype=np.int64))
        return self._pipeline.generate(openvino_genai.TokenizedInputs(ids, mask), config)


def export(checkpoint: str, folder: str) -> None:
    """Write the checkpoint as OpenVINO's intermediate representation. Called in the peer's environment."""
    from optimum.exporters.openvino import main_export
    from optimum.intel.openvino.configuration import OVConfig

    main_export(checkpoint, output=folder, task="text-generation-with-past", ov_config=OVConfig(dtype="bf16"))


if __name__ == "__main__":
    export(*sys.argv[1:])
