"""The training examples: where loss is taken, and how they are batched."""

import random

import pytest
from transformers import PreTrainedTokenizerBase

from qwenopt.demo import task
from qwenopt.demo.data import IGNORE, ExampleWriter, batches
from qwenopt.demo.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """(whole text, text with loss) of each example."""
    writer = ExampleWriter(tokenizer, random.Random(3))
    drawn = [writer.draw() for _ in range(600)]
    for example in drawn:
        assert len(example.ids) == len(example.labels)
        assert all(label in (IGNORE, token) for token, label in zip(example.ids, example.labels, strict=True))
    return [
        (tokenizer.decode(example.ids), tokenizer.decode([label for label in example.labels if label != IGNORE]))
        for example in drawn
    ]


def test_loss_covers_exactly_the_assistants_own_words(examples: list[tuple[str, str]]) -> None:
    for text, learned in examples:
        assert text.endswith(learned)
        assert learned.endswith("<|im_end|>\n")
        assert learned.startswith(("<think>\nWe start", "The answer is"))


def test_cut_traces_are_closed_by_force_without_loss(examples: list[tuple[str, str]]) -> None:
    stops = [text for text, _ in examples if task.STOP_SENTENCE in text]
    assert 0.08 < len(stops) / len(examples) < 0.22
    for text, learned in examples:
        if task.STOP_SENTENCE in text:
            assert learned.startswith("The answer is")


def test_all_kinds_occur_and_answers_are_right(examples: list[tuple[str, str]]) -> None:
    modes = {"direct": 0, "whole": 0, "cut": 0, "turns": 0, "system": 0}
    for text, learned in examples:
        modes["turns"] += text.count("<|im_start|>user") == 2
        modes["system"] += text.startswith("<|im_start|>system")
        if "<think>\n\n</think>" in text:
            modes["direct"] += 1
        elif learned.startswith("<think>"):
            modes["whole"] += 1
            assert task.read_answer(text) == int(learned.split("So the answer is ")[-1][0])
        else:
            modes["cut"] += 1
    assert min(modes.values()) > 10


def test_batches_repeat_for_a_seed_and_stay_in_size(tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (batches(tokenizer, seed, 1024) for seed in (0, 0, 1))
    differs = False
    for _ in range(5):
        (ids, labels), (same, _), (changed, _) = next(first), next(again), next(other)
        assert ids.shape == labels.shape
        assert ids.numel() <= 1024
        assert ids.equal(same)
        differs = differs or not ids.equal(changed)
    assert differs
