"""The least that a decode step must read, as formulas over the shape of a model."""

from __future__ import annotations

from qwenopt.testing.models import SHAPES, Shape

ITEM = 2  # bytes of a bfloat16


def attention_weights(s: Shape) -> int:
    """Elements of the four projections of a layer."""
    return s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads)


def feed_forward_weights(s: Shape, tokens: int) -> float:
    """Elements of a layer's feed-forward weights that `tokens` tokens touch, with experts chosen evenly."""
    if not s.is_moe:
        return 3 * s.hidden * s.intermediate
    touched = s.experts * (1 - (1 - s.top_k / s.experts) ** tokens)
    return 3 * s.hidden * s.moe_intermediate * touched + s.hidden * s.experts


def decode_bytes(model: str, tokens: int = 1, context: int = 0) -> float:
    """Bytes of weights, and of keys and values of `context` tokens for each row, that a step of `tokens` rows reads."""
    s = SHAPES[model]
    layer = attention_weights(s) + feed_forward_weights(s, tokens)
    cache = 2 * s.kv_heads * s.head_dim * s.layers * context * tokens
    return ITEM * (s.layers * layer + s.hidden * s.vocab + cache)


def share(model: str, tokens: int, context: int, seconds: float, gbps: float) -> float:
    """What a step of so many seconds reaches of the memory's speed."""
    return decode_bytes(model, tokens, context) / gbps / 1e9 / seconds
