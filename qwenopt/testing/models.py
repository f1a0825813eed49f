"""Qwen3 models without checkpoints: the true shapes of all eight, and random models of them, tiny or in full size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VOCAB = 151936


@dataclass(frozen=True)
class Shape:
    """Dimensions of one published Qwen3 model, as in its config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    experts: int = 0
    top_k: int = 0
    moe_intermediate: int = 0
    head_dim: int = 128
    vocab: int = VOCAB

    @property
    def is_moe(self) -> bool:
        return self.experts > 0


SHAPES: dict[str, Shape] = {
    "0.6B": Shape(1024, 3072, 28, 16, 8, tied=True),
    "1.7B": Shape(2048, 6144, 28, 16, 8, tied=True),
    "4B": Shape(2560, 9728, 36, 32, 8, tied=True),
    "8B": Shape(4096, 12288, 36, 32, 8),
    "14B": Shape(5120, 17408, 40, 40, 8),
    "32B": Shape(5120, 25600, 64, 64, 8),
    "30B-A3B": Shape(2048, 6144, 48, 32, 4, experts=128, top_k=8, moe_intermediate=768),
    "235B-A22B": Shape(4096, 12288, 94, 64, 4, experts=128, top_k=8, moe_intermediate=1536),
}
DENSE = tuple(name for name, shape in SHAPES.items() if not shape.is_moe)
MOE = tuple(name for name, shape in SHAPES.items() if shape.is_moe)

# What differs between two tiny models of one structure: enough to tell models apart, small enough for milliseconds.
_TINY: dict[str, dict[str, int]] = {
    "0.6B": {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96},
    "1.7B": {"hidden_size": 96, "head_dim": 32, "intermediate_size": 128},
    "4B": {"hidden_size": 64, "head_dim": 16, "intermediate_size": 160},
    "8B": {"hidden_size": 96, "head_dim": 16, "intermediate_size": 128},
    "14B": {"hidden_size": 80, "head_dim": 16, "intermediate_size": 96},
    "32B": {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128},
    "30B-A3B": {"hidden_size": 64, "head_dim": 16, "num_experts": 16, "num_experts_per_tok": 4},
    "235B-A22B": {"hidden_size": 64, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2},
}


def _config(name: str, values: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3MoeConfig

    return (Qwen3MoeConfig if SHAPES[name].is_moe else Qwen3Config)(**values)


def full_config(name: str, **changes: Any) -> Any:
    """The configuration of a published model; `changes` override it, as in `num_hidden_layers=4`."""
    s = SHAPES[name]
    values: dict[str, Any] = {
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "vocab_size": s.vocab,
        "tie_word_embeddings": s.tied,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }
    if s.is_moe:
        values |= {
            "num_experts": s.experts,
            "num_experts_per_tok": s.top_k,
            "moe_intermediate_size": s.moe_intermediate,
            "norm_topk_prob": True,
        }
    return _config(name, values | changes)


def tiny_config(name: str, **changes: Any) -> Any:
    """A configuration with the true head counts, head groups and tying of a published model, and little else."""
    values: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 128, "max_position_embeddings": 512}
    values |= _TINY[name]
    if SHAPES[name].is_moe:
        values["moe_intermediate_size"] = 32
    return full_config(name, **(values | changes))


def build(config: Any, dtype: torch.dtype | None = None, *, seed: int = 0) -> torch.nn.Module:
    """A random model of `config` in eval mode, its norm weights shaken away from one so that a lost weight shows."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.dim() == 1:
                    p.copy_(1 + 0.2 * torch.randn_like(p))
                elif "embed_tokens" in key or "lm_head" in key:
                    p.normal_(0, 0.1 if config.tie_word_embeddings else 0.5)  # tied and large: it repeats its input
                else:
                    p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
    made: torch.nn.Module = model.to(dtype or torch.float32).eval()
    return made


def tiny_model(name: str, dtype: torch.dtype | None = None, *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random tiny model with the structure of a published one; see `tiny_config` and `build`."""
    return build(tiny_config(name, **changes), dtype, seed=seed)
