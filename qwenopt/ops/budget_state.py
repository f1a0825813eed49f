"""The state of one row's thinking: columns of an int32 tensor [R, WIDTH], 512 bytes a row.

Columns marked f32 hold the bits of a float32. `csrc/cpu/kernels/budget_step.h` numbers them likewise.
"""

from __future__ import annotations

import enum

WIDTH = 128
RING = 64  # the last columns: hashes at the last boundaries, for the loop rule
NO_ID = -2  # in place of a token id: none. As a sampled token: the row sits out; -1 there: nothing was sampled
MAX_GRACE = 3  # tokens that a cut waits for a character to be whole; UTF-8 has at most three bytes after the first
MAX_IMPLICIT = 4
HASH_MASK = 0x7FFFFFFF
HASH_FACTOR = 0x5BD1E995


class Column(enum.IntEnum):
    """Where each number of a row stands."""

    # What the row does now.
    PHASE = 0
    USED = 1  # tokens that count against the budget
    GEN = 2  # tokens generated
    CTRL = 3  # written by the host: 1 ends the block at the next step
    NEED = 4  # bytes that the last character still lacks
    LAST = 5  # the last token's entry of the look-up table
    GRACE = 6  # tokens waited for a whole character
    PENDING = 7  # the reason for which the block ends once the character is whole
    FPTR = 8  # the text being forced: its place in the row of the table, its length, the next position
    FLEN = 9
    FPOS = 10
    SINCE = 11  # answer tokens since a forced end; -1: no forced end
    # What the configuration asks for.
    BUDGET = 12  # -1: unlimited
    WINDOW_AT = 13  # tokens used from which a boundary ends the block; -1: never
    MIN = 14
    WAIT = 15  # 1: before MIN the end marker is replaced, not masked
    RESERVE_AT = 16  # tokens generated from which the block ends; -1: never
    BLOCK = 17  # 1: the budget is counted anew in each block
    CLOSE = 18  # 1: the end of the text inside a block closes the block instead
    WHOLE = 19  # 1: wait for whole characters
    BOUNDARY = 20  # bits of the look-up table that make a boundary for the window and the soft bias
    BUDGET_TEXT = 21  # place and length of the two texts, and whether a newline at their start may be left out
    BUDGET_LEN = 22
    BUDGET_SKIP = 23
    EXIT_TEXT = 24
    EXIT_LEN = 25
    EXIT_SKIP = 26
    IMPLICIT = 27  # four ids that end a block without its marker
    GUARD = 31  # answer tokens after a forced end without a marker
    MIN_ANSWER = 32  # answer tokens after a forced end before the text may end
    SOFT_AT = 33
    SOFT_WIDTH = 34
    SOFT_BIAS = 35  # f32
    # What is reported.
    REASON = 36
    EXIT_STEP = 37  # the token of the output at which the last block began to end; -1: none did
    THOUGHT = 38
    FORCED = 39
    BLOCKS = 40
    ANSWERED = 41
    MARKERS = 42  # markers that the model wrote itself, and an end of text inside a block
    # Rules that end a block early; each with the bits that make a boundary for it, 0 turning it off.
    MARGIN_AT = 43
    MARGIN_TAU = 44  # f32
    MARGIN_PATIENCE = 45
    MARGIN_COUNT = 46
    LOOP_AT = 47
    LOOP_TIMES = 48
    LOOP_HASH = 49  # of about the last 16 tokens
    LOOP_NEXT = 50  # where the next hash goes
    LOOP_HITS = 51  # how often the last boundary's hash is in the ring
    ENTROPY_AT = 52
    ENTROPY_DELTA = 53  # f32
    ENTROPY_ETA = 54  # f32
    ENTROPY_ALPHA = 55  # f32
    ENTROPY_AFTER = 56
    ENTROPY_MEAN = 57  # f32
    ENTROPY_VAR = 58  # f32
    ENTROPY_COUNT = 59
    PROBE_AT = 60
    PROBE_TAU = 61  # f32
    PROBE_PATIENCE = 62
    PROBE_COUNT = 63


FLOATS = frozenset(
    {
        Column.SOFT_BIAS,
        Column.MARGIN_TAU,
        Column.ENTROPY_DELTA,
        Column.ENTROPY_ETA,
        Column.ENTROPY_ALPHA,
        Column.ENTROPY_MEAN,
        Column.ENTROPY_VAR,
        Column.PROBE_TAU,
    }
)


class Phase(enum.IntEnum):
    """OFF and DONE rows pass tokens through and change nothing."""

    OFF = 0  # the slot is not in use
    IDLE = 1  # no block has begun
    THINK = 2
    GRACE = 3  # the block ends as soon as the character is whole
    FORCE = 4  # the closing text is being written
    ANSWER = 5
    DONE = 6  # the text has ended


class Reason(enum.IntEnum):
    """Why the last block ended; the lower number wins where two coincide, after GRACE's own."""

    NONE = 0
    NATURAL = 1
    TOOL = 2
    EOS = 3
    DISABLED = 4
    MANUAL = 5
    BUDGET = 6
    RESERVE = 7
    WINDOW = 8
    MARGIN = 9
    LOOP = 10
    ENTROPY = 11
    PROBE = 12


class Bit(enum.IntFlag):
    """The look-up table's entry of a token, uint8."""

    NEWLINE = 1  # its text ends with a newline
    PARAGRAPH = 2  # ... with two
    SENTENCE = 4  # ... with the end of a sentence, whatever white space follows
    REFLECTION = 8  # "Wait", "Hmm", "Alternatively": doubt
    MISSING = 48  # two bits, a number of bytes: those lacking at the end, or with CONTINUES those it has
    CONTINUES = 64  # the token is nothing but continuation bytes
    ANY = 128  # every token


MISSING_SHIFT = 4


class Id(enum.IntEnum):
    """Where the ids that all rows share stand in an int32 tensor [8]; NO_ID where there is none."""

    START = 0
    END = 1
    WAIT = 2
    EOS = 4  # four of them


NUM_IDS = 8
MAX_EOS = 4


class Signal(enum.IntEnum):
    """What the exit rules read, float32 [R, 3] from the raw logits."""

    MARGIN = 0  # the largest logit minus that of the end marker
    ENTROPY = 1  # of the next token, in nats
    PROBE = 2  # the score of a probe of the hidden state
