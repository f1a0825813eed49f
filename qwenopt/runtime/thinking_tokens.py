"""Qwen3's markers and texts as ids of the tokenizer at hand, and what every token means for a cut.

Ids differ between the vocabularies of Qwen3 and its successors, and a wrong one does nothing without a sound. So they
are looked up, never assumed, and a tokenizer that has no such tokens is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwenopt.ops.budget_state import MAX_EOS, MISSING_SHIFT, NO_ID, NUM_IDS, Bit, Id, Phase
from qwenopt.runtime.thinking import ThinkingConfig

START, END = "<think>", "</think>"
SENTENCE = (
    f"Considering the limited time by the user, I have to give the solution based on the thinking directly now.\n{END}"
)
TEXTS = {"qwen3": f"\n\n{SENTENCE}\n\n", "report": f"{SENTENCE}.\n\n", "short": f"\n{END}\n\n", "bare": END}
EMPTY_BLOCK = f"{START}\n\n{END}\n\n"  # what the chat template writes for enable_thinking=False
# Ends of sentences in the scripts that have marks of their own, and what may close behind one.
STOPS = ".!?。！？｡．…؟۔।॥։჻።፧፨᙮᠃᠉‼⁇⁈⁉⸮꓿꘎꘏꛳꛷"
CLOSERS = "\"')]}*_»”’）」』】》"
REFLECTIONS = {"wait", "hmm", "alternatively"}


@dataclass(frozen=True, eq=False)
class ThinkingTokens:
    """A tokenizer seen by thinking control.

    pieces: the bytes of each token. lut: uint8 [V], `Bit`s of each. texts: the named closing texts in ids. newlines:
    ids of nothing but newlines. tool: the id of `<tool_call>`, or None. turn: the id of `<|im_start|>`, or None.
    hybrid: whether the chat template can switch thinking off, so that an empty block is what the model was trained on.
    """

    start: int
    end: int
    wait: int
    eos: tuple[int, ...]
    pieces: tuple[bytes, ...]
    lut: Tensor
    texts: dict[str, tuple[int, ...]]
    empty_block: tuple[int, ...]
    newlines: frozenset[int]
    tool: int | None
    turn: int | None
    hybrid: bool
    tokenizer: Any

    @classmethod
    def of(
        cls, tokenizer: Any, *, vocab_size: int | None = None, eos_token_id: int | Sequence[int] | None = None
    ) -> ThinkingTokens:
        """From a transformers tokenizer.

        `vocab_size` is the number of logits (the rows of lm_head; default: the tokenizer's tokens); `eos_token_id` are
        the ids that end the text (default: the tokenizer's own; a generation config may have more). Raises ValueError
        if `<think>` or `</think>` is not one token, with what it is.
        """
        start, end = _marker(tokenizer, START), _marker(tokenizer, END)
        pieces = token_bytes(tokenizer)
        size = max(vocab_size or 0, len(pieces))
        lut = torch.full((size,), int(Bit.ANY), dtype=torch.uint8)
        lut[: len(pieces)] = torch.tensor([_bits(piece) for piece in pieces], dtype=torch.uint8)
        if eos_token_id is None:
            eos_token_id = tokenizer.eos_token_id
        eos = tuple([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or ())
        if len(eos) > MAX_EOS or not all(0 <= i < size for i in eos):
            raise ValueError(f"thinking: eos_token_id {eos}; there must be at most {MAX_EOS}, below {size}")
        waits = [encode(tokenizer, text) for text in (" wait", "wait", "Wait")]
        return cls(
            start=start,
            end=end,
            wait=next((ids[0] for ids in waits if len(ids) == 1), waits[0][-1]),
            eos=eos,
            pieces=tuple(pieces),
            lut=lut,
            texts={name: encode(tokenizer, text) for name, text in TEXTS.items()},
            empty_block=encode(tokenizer, EMPTY_BLOCK),
            newlines=frozenset(i for i, piece in enumerate(pieces) if piece and not piece.strip(b"\n")),
            tool=_single(tokenizer, "<tool_call>"),
            turn=_single(tokenizer, "<|im_start|>"),
            hybrid="enable_thinking" in (getattr(tokenizer, "chat_template", None) or "enable_thinking"),
            tokenizer=tokenizer,
        )

    def text(self, name: str, value: str | Sequence[int]) -> tuple[int, ...]:
        """The ids of a closing text; raises ValueError unless they hold the end marker once and no start marker."""
        if not isinstance(value, str):
            ids = tuple(value)
        else:
            ids = self.texts[value] if value in self.texts else encode(self.tokenizer, value)
        if ids.count(self.end) != 1 or self.start in ids or not all(0 <= i < len(self.lut) for i in ids):
            raise ValueError(
                f"thinking: {name} {value!r} is {list(ids)}; it must hold {END} ({self.end}) once, no {START} "
                f"({self.start}), and only ids below {len(self.lut)}"
            )
        return ids

    def implicit_ends(self, config: ThinkingConfig) -> tuple[int, ...]:
        """The ids that end a block without its marker."""
        if config.implicit_end_ids is not None:
            return config.implicit_end_ids
        return () if self.tool is None else (self.tool,)

    def ids(self) -> Tensor:
        """int32 [8] by `Id`."""
        ids = torch.full((NUM_IDS,), NO_ID, dtype=torch.int32)
        ids[Id.START], ids[Id.END], ids[Id.WAIT] = self.start, self.end, self.wait
        ids[Id.EOS : Id.EOS + len(self.eos)] = torch.tensor(self.eos, dtype=torch.int32)
        return ids

    def initial_phase(self, prompt_ids: Iterable[int]) -> tuple[Phase, int]:
        """Where the prompt leaves off: IDLE, THINK or ANSWER, and the thinking it holds, in tokens.

        Only the current turn counts; the newline that the template writes after `<think>` is not thinking.
        """
        prompt = list(prompt_ids)
        if self.turn in prompt:
            prompt = prompt[len(prompt) - 1 - prompt[::-1].index(self.turn) :]
        markers = [i for i, token in enumerate(prompt) if token in (self.start, self.end)]
        if not markers:
            return Phase.IDLE, 0
        if prompt[markers[-1]] == self.end:
            return Phase.ANSWER, 0
        inner = prompt[markers[-1] + 1 :]
        return Phase.THINK, len(inner) - (bool(inner) and inner[0] in self.newlines)


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of `text` and nothing around it."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _single(tokenizer: Any, text: str) -> int | None:
    ids = encode(tokenizer, text)
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids) == text else None


def _marker(tokenizer: Any, text: str) -> int:
    found = _single(tokenizer, text)
    if found is None:
        raise ValueError(
            f"thinking: {text} is {list(encode(tokenizer, text))} for this tokenizer; thinking can be controlled only "
            "where it is one token, as it is for Qwen3"
        )
    return found


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(rest)}}


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every token of a byte-level vocabulary; b"" for ids without one."""
    alphabet = _byte_alphabet()
    added = {int(i): token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
    pieces = []
    for i, text in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if i in added or text is None:
            pieces.append(added.get(i, b""))
            continue
        try:
            pieces.append(bytes(alphabet[c] for c in text))
        except KeyError:
            raise ValueError(
                f"thinking: token {i} is {text!r}; the vocabulary must be byte-level, as Qwen3's"
            ) from None
    return pieces


def missing_bytes(piece: bytes) -> int:
    """How many bytes the UTF-8 sequence that `piece` ends in still lacks, 0 if none or if it is invalid."""
    for back in range(1, min(4, len(piece)) + 1):
        byte = piece[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return max(length - back, 0)
        if byte < 0x80:
            return 0
    return 0


def _bits(piece: bytes) -> int:
    bits = int(Bit.ANY)
    if piece and all(0x80 <= byte < 0xC0 for byte in piece):
        return bits | Bit.CONTINUES | (min(len(piece), 3) << MISSING_SHIFT)
    bits |= missing_bytes(piece) << MISSING_SHIFT
    bits |= Bit.NEWLINE if piece.endswith(b"\n") else 0
    bits |= Bit.PARAGRAPH if piece.endswith(b"\n\n") else 0
    text = piece.decode("utf-8", "ignore")
    bits |= Bit.SENTENCE if text.rstrip().rstrip(CLOSERS).endswith(tuple(STOPS)) else 0
    bits |= Bit.REFLECTION if text.strip().lower() in REFLECTIONS else 0
    return bits
