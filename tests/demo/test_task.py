"""The demo task: questions, traces, splits and the answer checker."""

import random
import re

import pytest

from qwenopt.demo import task


def questions(split: str, count: int, seed: int = 7) -> list[task.Question]:
    rng = random.Random(seed)
    return [task.make_question(rng, split) for _ in range(count)]


def work_out(text: str) -> int:
    """Answer a question from its text alone, by another way than the task's own."""
    value = int(re.search(r"(?:with|is) (\d)", text).group(1))
    for operation, operand in re.findall(r"\d\) (add|subtract|multiply by) (\d)\.", text):
        value = {"add": value + int(operand), "subtract": value - int(operand), "multiply by": value * int(operand)}[
            operation
        ]
    return value % 10


def test_answer_is_what_the_text_asks_for() -> None:
    drawn = questions("train", 300)
    assert [question.answer for question in drawn] == [work_out(question.text) for question in drawn]


def test_every_length_and_prompt_form_occurs() -> None:
    drawn = questions("train", 600)
    assert {len(question.steps) for question in drawn} == set(range(task.MIN_STEPS, task.MAX_STEPS + 1))
    for closing in task.CLOSINGS:
        assert any(question.text.endswith(closing) for question in drawn)
    assert len({question.text.split(" 1)")[0].replace(str(question.start), "#") for question in drawn}) == len(
        task.OPENINGS
    )


def test_splits_are_disjoint_whatever_the_wording() -> None:
    train = {(question.start, question.steps) for question in questions("train", 3000)}
    test = {(question.start, question.steps) for question in questions("test", 1000)}
    assert not train & test
    assert all(task.split_of(*chain) == "train" for chain in train)
    assert all(task.split_of(*chain) == "test" for chain in test)


def test_split_depends_on_the_chain_only() -> None:
    question = questions("test", 1)[0]
    reworded = task.Question(question.start, question.steps, "other words")
    assert task.split_of(reworded.start, reworded.steps) == "test"


def test_unseen_questions_are_different_unseen_and_repeatable() -> None:
    drawn = task.unseen_questions(500)
    assert len({question.text for question in drawn}) == 500
    assert all(task.split_of(question.start, question.steps) == "test" for question in drawn)
    assert drawn == task.unseen_questions(500)
    assert drawn != task.unseen_questions(500, seed=1)
    # One digit must not be a good guess for all.
    answers = [question.answer for question in drawn]
    assert max(answers.count(digit) for digit in range(10)) < 150


def test_trace_is_right_in_every_line_and_reaches_the_answer_in_the_first_pass() -> None:
    for question in questions("train", 200):
        trace = task.write_trace(question)
        lines = re.findall(r"^\d\)(\d)([-+*])(\d)=(\d)$", trace, flags=re.MULTILINE)
        assert len(lines) == len(question.steps) * (1 + task.num_checks(question))
        for left, symbol, right, result in lines:
            step = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert step[symbol] % 10 == int(result)
        first = trace.split("\n\n")[0]
        assert first.endswith(f"So the answer is {question.answer}.")
        assert trace.count(f"So the answer is {question.answer}.") == 1 + task.num_checks(question)


def test_checks_vary_from_none_to_four() -> None:
    assert {task.num_checks(question) for question in questions("test", 200)} == {0, 1, 2, 3, 4}


def test_reply_has_the_format_of_qwen3() -> None:
    question = questions("train", 1)[0]
    answer = f"The answer is {question.answer}."
    assert task.write_reply(question, False) == f"<think>\n\n</think>\n\n{answer}"
    assert task.write_reply(question, True) == f"<think>\n{task.write_trace(question)}\n</think>\n\n{answer}"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>\n\n</think>\n\nThe answer is 4.", 4),
        ("The answer is 4.", 4),
        ("<think>\nSo the answer is 9.\n</think>\n\nThe answer is 4.<|im_end|>", 4),
        ("<think>\nSo the answer is 9.", None),
        ("<think>\nSo the answer is 9.\n</think>\n\nI do not know.", None),
        ("The answer is 45.", None),
        ("", None),
    ],
)
def test_read_answer(reply: str, expected: int | None) -> None:
    assert task.read_answer(reply) == expected


def test_is_correct_accepts_only_the_right_digit() -> None:
    question = questions("train", 1)[0]
    assert task.is_correct(question, task.write_reply(question, True))
    assert not task.is_correct(question, f"The answer is {(question.answer + 1) % 10}.")


def test_bad_input_is_named() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="'dev'.*'train' or 'test'"):
        task.make_question(rng, "dev")
    with pytest.raises(ValueError, match="num_steps is 99.*3 to 7"):
        task.make_question(rng, "train", num_steps=99)
    with pytest.raises(ValueError, match="'divide'.*add, subtract, multiply by"):
        task.apply_step(1, "divide", 2)
