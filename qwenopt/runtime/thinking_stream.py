"""Tokens to text as they come: whole characters only, and each piece with the part of the reply it belongs to."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Literal, NamedTuple

from qwenopt.ops.budget_state import Phase
from qwenopt.runtime.thinking_tokens import ThinkingTokens

Part = Literal["thinking", "answer"]


class Piece(NamedTuple):
    """A piece of text and what it is part of."""

    text: str
    part: Part


class Utf8Stream:
    """Bytes to text: a character is given when its last byte has come, never half of one."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: bytes) -> str:
        """The characters that `piece` completes. Bytes that are no UTF-8 become U+FFFD, as in any decoder."""
        return self._decoder.decode(piece)

    def close(self) -> str:
        """Forget what is not whole; returns nothing, so that a cut character is not shown broken."""
        self._decoder.reset()
        return ""


class ThinkingStream:
    """One row's tokens to pieces of text, split by the markers as tokens, not by a search in the text.

    Markers and other added tokens that are marked special are not shown; text between `<think>` and `</think>` is
    "thinking", everything else "answer". The prompt decides where the reply begins.
    """

    def __init__(self, tokens: ThinkingTokens, prompt_ids: Iterable[int] = ()) -> None:
        self._tokens, self._stream = tokens, Utf8Stream()
        self._special = {tokens.start, tokens.end, *tokens.eos, *getattr(tokens.tokenizer, "all_special_ids", ())}
        phase, _ = tokens.initial_phase(prompt_ids)
        self.part: Part = "thinking" if phase == Phase.THINK else "answer"

    def part_of(self, token: int) -> Part:
        """Which part the next token belongs to; markers belong to the thinking."""
        return "thinking" if token in (self._tokens.start, self._tokens.end) else self.part

    def push(self, token: int) -> list[Piece]:
        """The text that this token completes, at most one piece."""
        implicit = self.part == "thinking" and token == self._tokens.tool
        if token == self._tokens.start or token == self._tokens.end or implicit:
            self._stream.close()
            self.part = "thinking" if token == self._tokens.start else "answer"
        if token in self._special or not 0 <= token < len(self._tokens.pieces):
            return []
        text = self._stream.push(self._tokens.pieces[token])
        return [Piece(text, self.part)] if text else []

    def split(self, ids: Iterable[int]) -> tuple[str, str]:
        """All of a reply at once: its thinking and its answer."""
        pieces = [piece for token in ids for piece in self.push(token)]
        both = ("".join(p.text for p in pieces if p.part == part) for part in ("thinking", "answer"))
        return next(both), next(both)
