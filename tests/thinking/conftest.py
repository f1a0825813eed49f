"""The demo tokenizer, which has Qwen's markers and all bytes, seen by thinking control."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from qwenopt.demo.load import demo_path
from qwenopt.runtime.thinking_tokens import ThinkingTokens, token_bytes
from qwenopt.testing.thinking_oracle import Text


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_path("dense"), local_files_only=True)


@pytest.fixture(scope="session")
def tokens(tokenizer: Any) -> ThinkingTokens:
    eos = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return ThinkingTokens.of(tokenizer, vocab_size=512, eos_token_id=eos)


@pytest.fixture(scope="session")
def text(tokenizer: Any) -> Text:
    return Text(token_bytes(tokenizer), frozenset(int(i) for i in tokenizer.added_tokens_decoder))
