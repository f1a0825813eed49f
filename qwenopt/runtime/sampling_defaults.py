"""How a model wants to be sampled, where the caller does not say: its generation_config."""

from __future__ import annotations

from typing import Any

from qwenopt.runtime.sample import SamplingParams


def sampling_of(model: Any, *, seed: int | None, **given: Any) -> SamplingParams:
    """The caller's settings, else those of the model's generation_config as `model.generate` reads them.

    A generation_config that does not sample is greedy unless a temperature is given. Raises what SamplingParams raises.
    """
    config = getattr(model, "generation_config", None)
    asked = {name: value for name, value in given.items() if value is not None}
    samples = bool(getattr(config, "do_sample", False)) or bool(asked)
    if asked.get("temperature") == 0 or not samples:
        return SamplingParams(temperature=0.0)
    found: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = getattr(config, name, None)
        if value is not None:
            found[name] = value
    penalty = getattr(config, "repetition_penalty", None)
    if penalty not in (None, 1.0):
        found["repetition_penalty"] = penalty
    return SamplingParams(**{**found, **asked}, seed=seed)
