"""The demo task: a chain of additions, subtractions and multiplications modulo ten.

A question names a start digit and 3 to 7 labelled steps.  The thinking trace works the steps one by
one, reaches the answer at the end of the first pass and then over-thinks: it goes through the steps
again 0 to 4 more times.  Pure Python; all randomness comes from the ``random.Random`` passed in.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

MIN_STEPS = 3
MAX_STEPS = 7
TEST_SHARE = 16  # one chain in 16 belongs to the test split

SYMBOLS: dict[str, str] = {"add": "+", "subtract": "-", "multiply by": "*"}

OPENINGS: tuple[str, ...] = (
    "Work modulo ten. Start with {start}.",
    "Start with {start} and work modulo ten.",
    "Here is a chain of steps modulo ten. The first number is {start}.",
    "Begin with {start}. Keep only the last digit after each step, counting around from nine to zero.",
)
CLOSINGS: tuple[str, ...] = (
    "What is the result?",
    "What do you get?",
    "Which digit comes out at the end?",
    "Please tell me the last digit.",
)

# One sentence per check, in this order: each says how many checks came before it, so whether to stop
# can be read off the latest sentence.
CHECKS: tuple[str, ...] = (
    "Wait, let me check again.",
    "Let me verify each step once more.",
    "Hmm, one more time to be sure.",
    "Let me go over it a last time.",
)

STOP_SENTENCE = (
    "\n\nConsidering the limited time by the user, I have to give the solution "
    "based on the thinking directly now.\n</think>\n\n"
)
BARE_STOP = "\n</think>\n\n"

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a careful assistant that answers questions about numbers.",
)

_ANSWER = re.compile(r"answer is (\d)(?!\d)")


@dataclass(frozen=True)
class Question:
    """One chain: ``start`` digit, ``steps`` as (operation name, digit), and the text that asks for it."""

    start: int
    steps: tuple[tuple[str, int], ...]
    text: str

    @property
    def answer(self) -> int:
        """The digit the chain ends on."""
        return self.values()[-1]

    def values(self) -> list[int]:
        """The digit after each step, start excluded."""
        values: list[int] = []
        value = self.start
        for name, operand in self.steps:
            value = apply_step(value, name, operand)
            values.append(value)
        return values


def apply_step(value: int, name: str, operand: int) -> int:
    """Return ``value`` (a digit) after one operation modulo ten; ``name`` is a key of ``SYMBOLS``."""
    if name == "add":
        return (value + operand) % 10
    if name == "subtract":
        return (value - operand) % 10
    if name == "multiply by":
        return (value * operand) % 10
    raise ValueError(f"unknown operation {name!r}: it must be one of {', '.join(SYMBOLS)}")


def split_of(start: int, steps: tuple[tuple[str, int], ...]) -> str:
    """Return "test" or "train" from a hash of the chain alone, so that rewordings stay in one split."""
    chain = str(start) + "".join(f"{SYMBOLS[name]}{operand}" for name, operand in steps)
    return "test" if zlib.crc32(chain.encode()) % TEST_SHARE == 0 else "train"


def make_question(rng: random.Random, split: str, num_steps: int | None = None) -> Question:
    """Draw one question of the "train" or "test" split, of ``num_steps`` steps or a random number."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: it must be 'train' or 'test'")
    if num_steps is not None and not MIN_STEPS <= num_steps <= MAX_STEPS:
        raise ValueError(f"num_steps is {num_steps}: it must be from {MIN_STEPS} to {MAX_STEPS}")
    while True:
        start = rng.randrange(10)
        count = num_steps if num_steps is not None else rng.randint(MIN_STEPS, MAX_STEPS)
        steps = tuple(_draw_step(rng) for _ in range(count))
        if split_of(start, steps) == split:
            break
    listed = " ".join(f"{index}) {name} {operand}." for index, (name, operand) in enumerate(steps, 1))
    text = f"{rng.choice(OPENINGS).format(start=start)} {listed} {rng.choice(CLOSINGS)}"
    return Question(start, steps, text)


def _draw_step(rng: random.Random) -> tuple[str, int]:
    """Draw an operation and its digit; multiplying by one would be a step without work."""
    name = rng.choice(tuple(SYMBOLS))
    return name, rng.randint(2 if name == "multiply by" else 1, 9)


def unseen_questions(count: int, seed: int = 2026) -> list[Question]:
    """Return ``count`` different questions of the test split."""
    rng = random.Random(seed)
    seen: dict[str, Question] = {}
    while len(seen) < count:
        question = make_question(rng, "test")
        seen.setdefault(question.text, question)
    return list(seen.values())


def num_checks(question: Question) -> int:
    """Return how often the trace re-checks, 0 to 4.

    It depends on the start digit, so that greedy decoding shows all of 0 to 4: drawn at random, the
    likeliest continuation would be the same number for every question.
    """
    return question.start % (len(CHECKS) + 1)


def write_pass(question: Question) -> str:
    """Return one walk through the steps and its conclusion, such as ``1)7+5=2\\n...So the answer is 2.``"""
    lines: list[str] = []
    value = question.start
    for index, ((name, operand), result) in enumerate(zip(question.steps, question.values(), strict=True), 1):
        lines.append(f"{index}){value}{SYMBOLS[name]}{operand}={result}\n")
        value = result
    return "".join(lines) + f"So the answer is {question.answer}."


def write_trace(question: Question) -> str:
    """Return the whole thinking trace: the first pass, then the checks."""
    walk = write_pass(question)
    checks = "".join(f"\n\n{sentence}\n{walk}" for sentence in CHECKS[: num_checks(question)])
    return f"We start with {question.start}.\n{walk}{checks}"


def write_answer(question: Question) -> str:
    """Return the assistant's visible answer."""
    return f"The answer is {question.answer}."


def write_reply(question: Question, thinking: bool) -> str:
    """Return the assistant's full text in Qwen3's format, with the trace or with an empty think block."""
    block = f"<think>\n{write_trace(question)}\n</think>\n\n" if thinking else "<think>\n\n</think>\n\n"
    return block + write_answer(question)


def read_answer(reply: str) -> int | None:
    """Return the digit that ``reply`` gives after its think block, or ``None`` where it gives none."""
    found = _ANSWER.findall(reply.rsplit("</think>", 1)[-1]) if _closed(reply) else []
    return int(found[-1]) if found else None


def _closed(reply: str) -> bool:
    """Whether ``reply`` has no think block or has closed it: an unfinished trace is no answer."""
    return "<think>" not in reply or "</think>" in reply


def is_correct(question: Question, reply: str) -> bool:
    """Whether ``reply`` answers ``question`` with the right digit."""
    return read_answer(reply) == question.answer
