"""What is asked of every contender, and the least that it costs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Workload:
    """A prefill of one prompt, or a decode of `batch` sequences after a short one. Lengths are tokens."""

    name: str
    title: str
    kind: str
    batch: int
    prompt: int

    def request(self, vocab: int, steps: int) -> dict[str, Any]:
        """The request to send; the token ids are the same at every call."""
        numbers = random.Random(0)
        prompts = [[numbers.randrange(vocab) for _ in range(self.prompt)] for _ in range(self.batch)]
        return {"kind": self.kind, "prompts": prompts, "steps": steps}

    def tokens(self, steps: int) -> int:
        """Tokens that the measured seconds stand for, over all sequences."""
        return self.prompt if self.kind == "prefill" else self.batch * steps


WORKLOADS: dict[str, Workload] = {
    load.name: load
    for load in (
        Workload("decode", "decode, batch 1", "decode", 1, 32),
        Workload("decode8", "decode, batch 8", "decode", 8, 32),
        Workload("prefill", "prefill, 512 tokens", "prefill", 1, 512),
    )
}


@dataclass(frozen=True)
class Cost:
    """The least that a model costs: bytes of weights read by one decode step, operations of one prefill."""

    weight_bytes: int
    step_bytes: dict[int, int]  # by the number of sequences
    prefill_flops: int

    def share(self, load: Workload, seconds: float, steps: int, gbps: float, gflops: float) -> float:
        """Share of the read bandwidth that a decode reached, or of peak arithmetic that a prefill did."""
        if load.kind == "prefill":
            return self.prefill_flops / seconds / 1e9 / gflops
        return self.step_bytes[load.batch] * steps / seconds / 1e9 / gbps


def expected_share(experts: int, top_k: int, sequences: int) -> float:
    """Share of the experts that at least one of the sequences' tokens chooses, if all are equally likely."""
    return 1.0 - (1.0 - top_k / experts) ** sequences


def cost(model: PreTrainedModel) -> Cost:
    """The cost of a model, whose weights may be on the meta device. Cached keys and values are not counted."""
    from qwenopt.cli import speed

    config = model.config
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    others = speed.bytes_per_token(model)
    if experts:
        others -= int(experts * config.num_experts_per_tok / config.num_experts)
    step_bytes = {}
    for batch in {load.batch for load in WORKLOADS.values()}:
        share = expected_share(config.num_experts, config.num_experts_per_tok, batch) if experts else 0.0
        step_bytes[batch] = others + int(experts * share)
    flops = speed.prefill_flops(model, WORKLOADS["prefill"].prompt)
    return Cost(sum(p.nbytes for p in model.parameters()), step_bytes, flops)


def cost_of(size: str) -> tuple[Cost, int]:
    """Cost and vocabulary of a full-size model by its name, without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from qwenopt.testing import fullsize

    config = fullsize.SIZES[size].config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return cost(model), config.vocab_size
