"""Decode and prefill of one loaded model under several backends: eager, qwenopt and, if asked for, Inductor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwenopt.cli import stream

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qwenopt.report import Report

PROMPT_TOKENS = 32
DECODE_STEPS = 16
PREFILL_TOKENS = 512

# Largest relative distance of bfloat16 logits from eager's, both rounded on the way; a wrong kernel is far beyond it.
MAX_LOGIT_ERROR = 0.1


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that one decode step of one sequence has to read: of the experts, only the chosen ones."""
    config = model.config
    total = 0.0
    for name, p in model.named_parameters():
        if "embed_tokens" in name and not config.tie_word_embeddings:
            continue  # one row of it is read
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1.0
        total += p.nbytes * share
    return int(total)


def prefill_flops(model: PreTrainedModel, tokens: int) -> int:
    """Floating point operations of a prompt of `tokens` tokens, with the logits of the last one."""
    config = model.config
    per_token = 0.0
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name:
            share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1.0
            per_token += 2 * p.numel() * share
    attention = 2 * tokens * tokens * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return int(per_token * tokens + attention + 2 * config.vocab_size * config.hidden_size)


def calls(model: PreTrainedModel, names: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Backend name -> how to call `model` with it. Graphs are specialised to their shapes, the same for all."""
    import torch

    import qwenopt

    made: dict[str, Callable[..., Any]] = {}
    for name in names:
        if name == "eager":
            made[name] = model.forward
        elif name == "qwenopt":
            made[name] = qwenopt.compile(model, dynamic=False)
        else:
            made[name] = torch.compile(model.forward, backend=name, dynamic=False)
    return made


@dataclass
class Workload:
    """A decode (16 steps after a prompt of 32 tokens) or a prefill (512 tokens) of one backend, run again and again.

    The prompt of a decode is filled in by eager and not timed; the tokens are the same for every backend.
    """

    kind: str
    model: PreTrainedModel
    call: Callable[..., Any]
    batch: int = 1
    cache: Any = field(init=False)

    def __post_init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self._steps = DECODE_STEPS if self.kind == "decode" else 1
        length = PROMPT_TOKENS if self.kind == "decode" else PREFILL_TOKENS
        vocab = self.model.config.vocab_size
        self._prompt = torch.randint(0, vocab, (self.batch, length), generator=generator)
        self._next = torch.randint(0, vocab, (self._steps, self.batch, 1), generator=generator)
        room = length + (self._steps if self.kind == "decode" else 0)
        self.cache = stream.static_cache(self.model, room, self.batch)
        self.tokens = self.batch * (self._steps if self.kind == "decode" else length)

    def start(self) -> list[torch.Tensor]:
        """Bring the cache to the beginning; returns the inputs to time."""
        self.cache.reset()
        if self.kind == "prefill":
            return [self._prompt]
        self._run(self.model.forward, self._prompt)
        return list(self._next)

    def first(self) -> tuple[torch.Tensor, float]:
        """Logits of the first timed call, and its seconds: compiles where that is still to be done."""
        ids = self.start()[0]
        begin = time.perf_counter()
        logits = self._run(self.call, ids)
        return logits, time.perf_counter() - begin

    def run(self, inputs: list[torch.Tensor]) -> None:
        """The calls to time, on what `start` returned."""
        for ids in inputs:
            self._run(self.call, ids).argmax(-1)

    def tokens_per_second(self) -> float:
        """Speed of one run."""
        inputs = self.start()
        begin = time.perf_counter()
        self.run(inputs)
        return self.tokens / (time.perf_counter() - begin)

    def _run(self, call: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.no_grad():
            output = call(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]  # type: ignore[no-any-return]


def logit_error(logits: torch.Tensor, eager: torch.Tensor) -> float:
    """Distance of logits from eager's, relative to their size; infinite where they are not finite."""
    distance = (logits.float() - eager.float()).norm() / eager.float().norm()
    return float(distance) if distance.isfinite() else float("inf")


class NewGraphs:
    """What the backend reported since this object was made."""

    def __init__(self) -> None:
        from qwenopt import report

        self._old = {graph.index for graph in report.last_report().graphs}

    def report(self) -> Report:
        from qwenopt import report

        return report.Report([g for g in report.last_report().graphs if g.index not in self._old])
