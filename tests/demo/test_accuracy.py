"""The shipped weights answer unseen questions: well with thinking, badly without."""

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwenopt.demo.evaluate import accuracy, greedy, prompt_ids, thinking_tokens
from qwenopt.demo.load import DEMO_NAMES, demo_model
from qwenopt.demo.task import unseen_questions

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are so small that a second thread gains little, and costs much where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=DEMO_NAMES)
def loaded(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return demo_model(request.param, torch.float32)


def test_thinking_pays(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    thinking = accuracy(*loaded, thinking=True, num_questions=500)
    assert thinking.accuracy >= 0.95
    assert 60 <= thinking.mean_thinking_tokens <= 250
    direct = accuracy(*loaded, thinking=False, num_questions=500)
    assert direct.accuracy <= 0.70
    assert direct.mean_thinking_tokens == 0


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_bfloat16_is_as_good(name: str) -> None:
    model, tokenizer = demo_model(name, torch.bfloat16)
    assert accuracy(model, tokenizer, thinking=True, num_questions=50).accuracy >= 0.95


def test_accuracy_rises_with_the_budget(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    none, some, full = (accuracy(*loaded, thinking=True, num_questions=50, budget=n).accuracy for n in (0, 48, 80))
    assert none + 0.1 < some < full - 0.1
    assert full >= 0.95


def test_untrained_weights_fail(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    """The measure can fail: the same code gives random weights no answers."""
    model, tokenizer = loaded
    blank = type(model)(model.config)
    assert accuracy(blank, tokenizer, thinking=False, num_questions=50).accuracy < 0.1


def test_batched_greedy_equals_generate_on_each_row(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    # Short prompts off the task get much padding, and uncertain continuations that a wrong mask changes.
    prompts = [prompt_ids(tokenizer, question, True) for question in unseen_questions(2)]
    prompts += [tokenizer(text).input_ids for text in ("hi", "Work", "Start with 7. 1) add")]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    together = greedy(model, prompts, 90, {end, pad}, pad)
    for prompt, reply in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=90, do_sample=False)
        assert reply == alone[0, len(prompt) :].tolist()


def test_the_number_of_checks_varies(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    prompts = [prompt_ids(tokenizer, question, True) for question in unseen_questions(40)]
    replies = greedy(model, prompts, 400, {tokenizer.eos_token_id}, tokenizer.pad_token_id)
    counts = {tokenizer.decode(reply).count("So the answer is") for reply in replies}
    assert counts >= {1, 2, 3, 4}
    assert all(thinking_tokens(tokenizer, reply) < 400 for reply in replies)


def test_bad_numbers_are_refused(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    with pytest.raises(ValueError, match="num_questions is 0"):
        accuracy(*loaded, thinking=True, num_questions=0)
    with pytest.raises(ValueError, match="budget is 5 with thinking=False"):
        accuracy(*loaded, thinking=False, budget=5)
