"""hf_generate: qwenopt.generate by way of `model.generate(..., custom_generate=qwenopt.hf_generate)`.

transformers prepares input, length, sampling and stop tokens as for its own loop; this one does the rest. What it
cannot do it refuses. transformers 5.23 does not hand `streamer` on to a custom loop; `on_token` takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qwenopt.errors import QwenoptError
from qwenopt.runtime.generate import GenerateOutput, generate
from qwenopt.runtime.paged_cache import PagedKVCache
from qwenopt.runtime.tail import Probe

# transformers' names of what the sampler does itself, from the generation_config.
_SAMPLED = frozenset(
    {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"}
    | {"RepetitionPenaltyLogitsProcessor", "LogitNormalization"}
)
_STOPPED = frozenset({"MaxLengthCriteria", "EosTokenCriteria"})
# What makes transformers take another loop than sampling, or keep what this one does not make.
_PLAIN: dict[str, Any] = {
    "num_beams": (None, 1),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


def hf_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    thinking: Any = None,
    thinking_tokenizer: Any = None,
    probe: Probe | None = None,
    on_token: Callable[[int, int], object] | None = None,
    seed: int | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateOutput:
    """What transformers calls; `thinking`, `thinking_tokenizer` (`tokenizer` is not handed on), `probe`, `on_token`
    (called with the prompt's number and the token) and `seed` are given to `model.generate` beside its own arguments.

    Returns sequences int64 [B, S + reply], or all of GenerateOutput under `return_dict_in_generate`.
    `past_key_values` may be a PagedKVCache. Raises QwenoptError for beams, scores, processors and criteria that this
    loop does not have.
    """
    config = generation_config or model.generation_config
    for name, plain in _PLAIN.items():
        if getattr(config, name, None) not in plain:
            raise QwenoptError(
                f"hf_generate: {name}={getattr(config, name)}; this loop has none. Leave custom_generate out"
            )
    _refuse("logits processor", logits_processor, _SAMPLED)
    _refuse("stopping criterion", stopping_criteria, _STOPPED)
    sampling: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        names = ("temperature", "top_k", "top_p", "min_p")
        sampling = {name: getattr(config, name, None) for name in names}
    cache = model_kwargs.get("past_key_values")
    out = generate(
        model,
        input_ids,
        model_kwargs.get("attention_mask"),
        max_new_tokens=config.max_length - input_ids.shape[1],
        thinking=thinking,
        tokenizer=thinking_tokenizer,
        probe=probe,
        cache=cache if isinstance(cache, PagedKVCache) else None,
        streamer=on_token,
        seed=seed,
        eos_token_id=config.eos_token_id if config.eos_token_id is not None else (),
        **sampling,
    )
    return out if config.return_dict_in_generate else out.sequences


def _refuse(what: str, given: Any, known: frozenset[str]) -> None:
    for one in given or ():
        if type(one).__name__ not in known:
            raise QwenoptError(
                f"hf_generate: the {what} {type(one).__name__} has no counterpart in this loop; it has "
                f"{', '.join(sorted(known))}. Leave custom_generate out"
            )
