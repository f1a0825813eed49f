"""Questions with known answers, and whether a reply gives them: what `qwenopt calibrate` measures on."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from qwenopt.errors import QwenoptError

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_STATED = re.compile(r"answer(?: is|:)\s*\**\s*([^\s*]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
NEEDED = 'needed: JSON lines such as {"question": "What is 2 + 3?", "answer": "5"}'


@dataclass(frozen=True)
class Question:
    """The text that asks, and whether a decoded reply, thinking included, answers it."""

    text: str
    is_right: Callable[[str], bool]


def demo_questions(count: int, split: str, seed: int = 2026) -> list[Question]:
    """Different questions of the demo models' task; split is "test" (never trained on) or "train"."""
    from qwenopt.demo import task

    if split == "test":
        drawn = task.unseen_questions(count, seed)
    else:
        rng, unique = random.Random(seed), dict[str, task.Question]()
        while len(unique) < count:
            question = task.make_question(rng, split)
            unique.setdefault(question.text, question)
        drawn = list(unique.values())
    return [Question(q.text, lambda reply, q=q: task.is_correct(q, reply)) for q in drawn]  # type: ignore[misc]


def read_questions(path: Path, pattern: str | None = None) -> list[Question]:
    """The questions of a JSON lines file, in its order.

    pattern: a regular expression whose last match behind the thinking is the answer (its first group, where it has
    one); without it, see `answer_of`. Raises QwenoptError that names the line that does not fit.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QwenoptError(f"{path} cannot be read: {error}; {NEEDED}") from error
    compiled = _compile(pattern)
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            text, answer = _parse(line, f"{path}, line {number}")
            judge = _judge(answer, compiled)
            questions.append(Question(text, judge))
    if not questions:
        raise QwenoptError(f"{path} holds no questions; {NEEDED}")
    return questions


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise QwenoptError(f"--answer-pattern {pattern!r} is no regular expression: {error}") from error


def _parse(line: str, where: str) -> tuple[str, str]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise QwenoptError(f"{where} is no JSON: {error}; {NEEDED}") from error
    fields = value if isinstance(value, dict) else {}
    question, answer = fields.get("question"), fields.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise QwenoptError(f'{where} has no text under "question"; {NEEDED}')
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise QwenoptError(f'{where} has no text or number under "answer"; {NEEDED}')
    return question, str(answer).rpartition("####")[2]  # GSM8K puts its answers behind their derivation


def _judge(answer: str, pattern: re.Pattern[str] | None) -> Callable[[str], bool]:
    def is_right(reply: str) -> bool:
        found = answer_of(reply, pattern)
        return found is not None and same(found, answer)

    return is_right


def answer_of(reply: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """The answer that a reply gives behind its thinking; None where it gives none, or has not ended its thinking.

    Without a pattern: the last `\\boxed{...}`, else the last "answer is ..." or "answer: ...", else the last number,
    else all that is there.
    """
    thought, closed, text = reply.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    if pattern is not None:
        matches = list(pattern.finditer(text))
        return matches[-1].group(1 if pattern.groups else 0) if matches else None
    for known in (_BOXED, _STATED, _NUMBER):
        found = known.findall(text)
        if found:
            return str(found[-1])
    return text if text.strip() else None


def same(given: str, wanted: str) -> bool:
    """Whether two answers are one: as numbers where both are, else as text but for case, spaces and end marks."""
    a, b = _plain(given), _plain(wanted)
    x, y = _number(a), _number(b)
    return a == b if x is None or y is None else x == y


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" $.!,;:\"'`*")


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", "").rstrip("%"))
    except (ValueError, ZeroDivisionError):
        return None
