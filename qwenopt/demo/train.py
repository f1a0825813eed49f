"""Trains a demo model: ``python -m qwenopt.demo.train dense --out DIR`` (about half an hour on one core).

Plain PyTorch on the CPU in float32; the weights are stored as bfloat16.  Every random choice comes from
the recipe's seeds: the same machine, library versions and thread count give the same weights.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qwenopt.demo.data import IGNORE, batches
from qwenopt.demo.load import DEMO_NAMES, load_checkpoint
from qwenopt.demo.tokenizer import MAX_LENGTH, PADDED_VOCAB_SIZE, build_tokenizer


@dataclass(frozen=True)
class Recipe:
    """One phase of training: a warm-up and a cosine; ``tokens_per_batch`` counts padded tokens."""

    steps: int
    tokens_per_batch: int = 2048
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0


# The dense model still mixes up subtracting 4 and subtracting 9 (the same modulo five) when the first
# phase ends; a short second one with fresh data settles that.
RECIPES: dict[str, tuple[Recipe, ...]] = {
    "dense": (Recipe(steps=3400), Recipe(steps=800, learning_rate=1.5e-3, seed=1)),
    "moe": (Recipe(steps=3400),),
}


def shared_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return the configuration entries that both models have."""
    return {
        "vocab_size": PADDED_VOCAB_SIZE,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "head_dim": 32,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": "sdpa",
    }


def build_model(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the untrained model ``name`` ("dense" or "moe") in float32."""
    shared = shared_config(tokenizer)
    if name == "dense":
        return Qwen3ForCausalLM(
            Qwen3Config(**shared, num_key_value_heads=2, intermediate_size=384, tie_word_embeddings=True)
        )
    if name != "moe":
        raise ValueError(f"unknown demo model {name!r}: the name must be 'dense' or 'moe'")
    config = Qwen3MoeConfig(
        **shared,
        num_key_value_heads=4,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
        experts_implementation="eager",
    )
    return Qwen3MoeForCausalLM(config)


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return Qwen3's generation defaults with this vocabulary's token ids."""
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    return GenerationConfig(
        bos_token_id=pad, eos_token_id=[end, pad], pad_token_id=pad,
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95,
    )  # fmt: skip


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then cosine down to a hundredth of the peak."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def build_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only; norms and embeddings are left free."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in decayed}
    free = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def batch_loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss to minimise, cross entropy per labelled token) of int64 [batch, length] ids and labels.

    No attention mask is passed: padding is on the right, where causal attention never looks, and
    without a mask the faster causal kernel is used.
    """
    extra = {"output_router_logits": True} if model.config.model_type == "qwen3_moe" else {}
    output = model(input_ids=ids, use_cache=False, **extra)
    logits = output.logits[:, :-1].flatten(0, 1)
    cross_entropy = F.cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
    if not extra:
        return cross_entropy, cross_entropy.detach()
    return cross_entropy + model.config.router_aux_loss_coef * output.aux_loss, cross_entropy.detach()


def run_phase(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, log_every: int = 50
) -> PreTrainedModel:
    """Train ``model`` in place for one phase and return it, its float32 weights rounded to bfloat16's values.

    Rounding here makes a phase that starts from a stored checkpoint the same as one that follows directly.
    """
    model.train()
    optimizer = build_optimizer(model, recipe)
    stream = batches(tokenizer, recipe.seed, recipe.tokens_per_batch)
    started = time.monotonic()
    recent: list[float] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        loss, cross_entropy = batch_loss(model, *next(stream))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        recent.append(cross_entropy.item())
        if (step + 1) % log_every == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step + 1}/{recipe.steps} loss {sum(recent) / len(recent):.4f} {minutes:.1f} min", flush=True)
            recent.clear()
    return model.eval().to(torch.bfloat16).to(torch.float32)


def train(
    name: str, tokenizer: PreTrainedTokenizerBase, phases: tuple[Recipe, ...], start: Path | None = None
) -> PreTrainedModel:
    """Run the phases one after the other, from the seed or from the checkpoint folder ``start``."""
    torch.manual_seed(phases[0].seed)
    model = load_checkpoint(start, torch.float32)[0] if start else build_model(name, tokenizer)
    for recipe in phases:
        model = run_phase(model, tokenizer, recipe)
    return model


def main() -> None:
    """Command line: train one model and save its checkpoint folder."""
    parser = argparse.ArgumentParser(description="Train a qwenopt demo model on the CPU.")
    parser.add_argument("name", choices=DEMO_NAMES)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--steps", type=int, help="a trial: only the first phase, and so many steps")
    parser.add_argument("--start", type=Path, help="run only the last phase, from this checkpoint folder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; part of what fixes the weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    phases = RECIPES[args.name][-1:] if args.start else RECIPES[args.name]
    if args.steps is not None:
        phases = (replace(phases[0], steps=args.steps),)
    tokenizer = build_tokenizer()
    model = train(args.name, tokenizer, phases, args.start)
    model.generation_config = generation_config(tokenizer)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved {sum(p.numel() for p in model.parameters())} parameters to {args.out}", flush=True)


if __name__ == "__main__":
    main()
