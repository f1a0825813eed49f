"""Training examples of the demo task: token ids with a loss mask, in length-bucketed batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenopt.demo import task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORE = -100

# Shares of the examples; what is left is thinking with the whole trace.
SHARE_NO_THINKING = 0.12
SHARE_CUT = 0.28
SHARE_MULTI_TURN = 0.08
SHARE_SYSTEM = 0.06
SHARE_BARE_STOP = 0.5

BUCKET_BATCHES = 32


@dataclass(frozen=True)
class Example:
    """Token ids and equally many labels (the id itself, or ``IGNORE`` where no loss is taken)."""

    ids: list[int]
    labels: list[int]


class ExampleWriter:
    """Draws examples; encodes each text once per call with the demo tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._rng = rng

    def draw(self) -> Example:
        """Draw one example: a prompt without loss, then the assistant's last turn."""
        rng = self._rng
        question = task.make_question(rng, "train")
        prompt = self._prompt(question)
        kind = rng.random()
        if kind < SHARE_NO_THINKING:
            pieces = [("<think>\n\n</think>\n\n", False), (task.write_answer(question) + "<|im_end|>\n", True)]
            return self._join(prompt, pieces)
        if kind < SHARE_NO_THINKING + SHARE_CUT:
            return self._cut(prompt, question)
        return self._join(prompt, [(task.write_reply(question, True) + "<|im_end|>\n", True)])

    def _prompt(self, question: task.Question) -> str:
        """The chat text up to the assistant's turn, at times with a system message or an earlier question."""
        rng = self._rng
        text = ""
        if rng.random() < SHARE_SYSTEM:
            text += f"<|im_start|>system\n{rng.choice(task.SYSTEM_PROMPTS)}<|im_end|>\n"
        if rng.random() < SHARE_MULTI_TURN:
            earlier = task.make_question(rng, "train")
            text += f"<|im_start|>user\n{earlier.text}<|im_end|>\n"
            text += f"<|im_start|>assistant\n{task.write_answer(earlier)}<|im_end|>\n"
        return text + f"<|im_start|>user\n{question.text}<|im_end|>\n<|im_start|>assistant\n"

    def _cut(self, prompt: str, question: task.Question) -> Example:
        """A trace cut after a random token, closed by force: loss on the answer, none on cut and close."""
        rng = self._rng
        trace = self._encode(task.write_trace(question)).ids
        kept = trace[: rng.randrange(len(trace) + 1)]
        stop = task.BARE_STOP if rng.random() < SHARE_BARE_STOP else task.STOP_SENTENCE
        start = self._encode(prompt + "<think>\n").ids
        forced = start + kept + self._encode(stop).ids
        answer = self._encode(task.write_answer(question) + "<|im_end|>\n").ids
        return Example(forced + answer, [IGNORE] * len(forced) + answer)

    def _join(self, prompt: str, pieces: list[tuple[str, bool]]) -> Example:
        """Encode prompt and pieces; each piece says whether it carries loss."""
        ids = self._encode(prompt).ids
        labels = [IGNORE] * len(ids)
        for text, has_loss in pieces:
            encoded = self._encode(text).ids
            ids = ids + encoded
            labels = labels + (encoded if has_loss else [IGNORE] * len(encoded))
        return Example(ids, labels)


def batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, tokens_per_batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels) forever, both int64 [batch, length], right-padded.

    Examples are sorted by length within a window of ``BUCKET_BATCHES`` batches, so little is padding;
    the batches of a window come in random order.
    """
    rng = random.Random(seed)
    writer = ExampleWriter(tokenizer, rng)
    pad = tokenizer.pad_token_id
    while True:
        window = _draw_window(writer, tokens_per_batch * BUCKET_BATCHES)
        window.sort(key=lambda example: len(example.ids))
        groups = _group(window, tokens_per_batch)
        rng.shuffle(groups)
        for group in groups:
            yield _pad(group, pad)


def _draw_window(writer: ExampleWriter, num_tokens: int) -> list[Example]:
    """Draw examples until they hold ``num_tokens`` tokens."""
    window: list[Example] = []
    total = 0
    while total < num_tokens:
        window.append(writer.draw())
        total += len(window[-1].ids)
    return window


def _group(window: list[Example], tokens_per_batch: int) -> list[list[Example]]:
    """Split examples, sorted by length, into batches of at most ``tokens_per_batch`` padded tokens."""
    groups: list[list[Example]] = [[]]
    for example in window:
        if groups[-1] and (len(groups[-1]) + 1) * len(example.ids) > tokens_per_batch:
            groups.append([])
        groups[-1].append(example)
    return groups


def _pad(group: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack a group right-padded to its longest example: ids with ``pad``, labels with ``IGNORE``."""
    import torch

    length = max(len(example.ids) for example in group)
    ids = torch.full((len(group), length), pad)
    labels = torch.full((len(group), length), IGNORE)
    for row, example in enumerate(group):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return ids, labels
