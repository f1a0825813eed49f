"""Greedy generation token by token, with text that is shown as soon as it is whole."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwenopt.errors import QwenoptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (printable bytes stand for themselves)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TextStream:
    """Turns tokens into text one by one and writes only whole characters.

    A character of several bytes may be spread over several tokens; its bytes are kept back until the last is there.
    All that is written, joined, is what the tokenizer's `decode` makes of all tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._added = tokenizer.added_tokens_decoder
        self._table = byte_of_character()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token: int) -> None:
        """Take one more token."""
        self._emit(self._decoder.decode(self._bytes(token)))

    def end(self) -> None:
        """Write what is left: the replacement character if the last one was cut short."""
        self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> None:
        if text:
            self._write(text)

    def _bytes(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special else added.content.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id of the model's padded vocabulary that no token has
            return b""
        if any(c not in self._table for c in piece):
            return str(piece).encode()
        return bytes(self._table[c] for c in piece)


@dataclass
class Reply:
    """Generated tokens, and the seconds that each took (the first one's include the prompt)."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Speed from the third token on: the first reads the prompt, and the second may wait for a decode graph."""
        return len(self.seconds[2:]) / sum(self.seconds[2:]) if len(self.seconds) > 2 else 0.0


def static_cache(model: PreTrainedModel, length: int, batch: int = 1) -> Any:
    """A key/value cache of fixed size for `batch` sequences of at most `length` tokens, allocated at once.

    Raises QwenoptError for more tokens than the model has positions for.
    """
    from transformers import StaticCache

    config = model.config
    if length > config.max_position_embeddings:
        raise QwenoptError(
            f"{length} tokens, prompt and reply together; the model takes {config.max_position_embeddings}"
        )
    cache = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    return cache


def greedy(
    call: Callable[..., Any],
    cache: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    on_token: Callable[[int], object] | None = None,
) -> Reply:
    """Continue `prompt` greedily by `call(input_ids=..., past_key_values=cache, ...)`, from an emptied cache.

    Ends after `max_new_tokens` tokens or the first of `stop_ids`, which is kept. `on_token` sees each token at once;
    its own time is not counted.
    """
    import torch

    reply = Reply()
    cache.reset()
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        while len(reply.tokens) < max_new_tokens:
            start = time.perf_counter()
            logits = call(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
            token = int(ids)
            reply.seconds.append(time.perf_counter() - start)
            reply.tokens.append(token)
            if on_token is not None:
                on_token(token)
            if token in stop_ids:
                break
    return reply


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, thinking: bool) -> list[int]:
    """Tokens of one user message in the tokenizer's chat format, or of the bare text where it has none."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that end a reply."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = model.config.eos_token_id
    if given is None:
        return set()
    return {given} if isinstance(given, int) else set(given)
