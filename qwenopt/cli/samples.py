"""Small arguments for each op: what `doctor` asks the providers about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Few of everything, but with grouped heads and several experts.
TOKENS, HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K = 2, 64, 32, 4, 2, 16, 4, 2
EPS = 1e-6


def sample_args(dtype: torch.dtype, device: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """Op name -> positional arguments in `dtype`."""
    import torch

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    x, weight = ones(TOKENS, HIDDEN), ones(HIDDEN)
    q, k = ones(1, TOKENS, HEADS, HEAD_DIM), ones(1, TOKENS, KV_HEADS, HEAD_DIM)
    rope = ones(1, TOKENS, HEAD_DIM)
    gate_up = ones(EXPERTS, 2 * INTER, HIDDEN)
    indices = torch.zeros(TOKENS, TOP_K, dtype=torch.int64, device=device)
    return {
        "rms_norm": (x, weight, EPS),
        "add_rms_norm": (x, x, weight, EPS),
        "qk_norm_rope": (q, k, ones(HEAD_DIM), ones(HEAD_DIM), rope, rope, EPS),
        "attention": (q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), None, None, True, HEAD_DIM**-0.5),
        "silu_mul": (ones(TOKENS, INTER), ones(TOKENS, INTER)),
        "moe_route": (ones(TOKENS, EXPERTS), TOP_K, True),
        "moe_experts": (x, indices, ones(TOKENS, TOP_K), gate_up, ones(EXPERTS, HIDDEN, INTER)),
        "linear": (x, ones(INTER, HIDDEN), None),
    }
