"""Streaming over the real vocabulary: no broken character, wherever a token ends; parts told apart by tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qwenopt.ops.budget_state import MISSING_SHIFT, Bit
from qwenopt.runtime.thinking_stream import Piece, ThinkingStream, Utf8Stream
from qwenopt.runtime.thinking_tokens import encode, missing_bytes, token_bytes

# A sentence in each script, most of them Article 1 of the Universal Declaration of Human Rights or a greeting.
SCRIPTS = {
    "Latin": "Tous les êtres humains naissent libres et égaux. Þórður ræður! Hà Nội ở đâu?",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι.",
    "Cyrillic": "Все люди рождаются свободными; їжак і ґанок.",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ։",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი.",
    "Hebrew": "כל בני האדם נולדו בני חורין.",
    "Arabic": "يولد جميع الناس أحراراً متساوين؟",
    "Persian": "تمام افراد بشر آزاد به دنیا می‌آیند.",
    "Urdu": "تمام انسان آزاد پیدا ہوئے ہیں۔",
    "Syriac": "ܟܠܢܝ ܒܪܢܫܐ ܡܬܝܠܕܝܢ",
    "Thaana": "ހުރިހާ އިންސާނުން",
    "NKo": "ߡߐ߱ ߓߍ߯ ߓߊ߲߯ ߣߐ߬",
    "Devanagari": "सभी मनुष्यों को गौरव और अधिकारों।",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে জন্মগ্রহণ করে।",
    "Gurmukhi": "ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ",
    "Gujarati": "પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ",
    "Odia": "ସମସ୍ତ ମଣିଷ ଜନ୍ମକାଳରୁ ସ୍ୱାଧୀନ",
    "Tamil": "மனிதப் பிறிவியினர் சகலரும்",
    "Telugu": "ప్రతిపత్తిస్వత్వముల విషయమున",
    "Kannada": "ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ",
    "Malayalam": "മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടും",
    "Sinhala": "සියලු මනුෂ්‍යයෝ නිදහස්ව",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระ",
    "Lao": "ມະນຸດເກີດມາມີສິດເສລີພາບ",
    "Tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ།",
    "Myanmar": "လူတိုင်းသည် တူညီ လွတ်လပ်သော",
    "Khmer": "មនុស្សទាំងអស់កើតមកមានសេរីភាព",
    "Ethiopic": "የሰው፡ልጅ፡ሁሉ፡ሲወለድ፡ነጻና።",
    "Cherokee": "ᏂᎦᏓ ᎠᏂᏴᏫ ᏂᎨᎫᏓᎸᎾ",
    "Canadian": "ᐃᓅᔪᓕᒫᑦ ᐊᓂᖅᑎᕆᔪᓐᓇᖅ",
    "Ogham": "᚛ᚑᚌᚐᚋ᚜",
    "Runic": "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ",
    "Mongolian": "ᠬᠦᠮᠦᠨ ᠪᠦᠷ ᠲᠥᠷᠥᠵᠦ",
    "Han": "人人生而自由,在尊嚴和權利上一律平等。",
    "Hiragana": "すべてのにんげんは、うまれながらにして。",
    "Katakana": "スベテノニンゲンハ、ジユウデアリ!",
    "Hangul": "모든 인간은 태어날 때부터 자유로우며.",
    "Bopomofo": "ㄖㄣˊ ㄖㄣˊ ㄕㄥ ㄦˊ",
    "Yi": "ꊿꂷꃅꄿꐨꐥ",
    "Javanese": "ꦱꦧꦼꦤ꧀ꦮꦺꦴꦁ",
    "Balinese": "ᬲᬫᬶᬳᬫᬦᬸᬲ",
    "Tifinagh": "ⵉⵎⴷⴰⵏⴻⵏ ⴰⴽⴽ ⵜⵍⴰⵍⴻⵏ",
    "Liberian": "ꕉꕜꕮ ꔔꘋ ꖸ",
    "Coptic": "ⲣⲱⲙⲉ ⲛⲓⲃⲉⲛ",
    "Glagolitic": "ⰲⱐⱄⰻ ⰾⱓⰴⰻⰵ",
    "Gothic": "𐌰𐌻𐌻𐌰𐌹 𐌼𐌰𐌽𐌽𐌰",
    "Deseret": "𐐏𐐢𐐢 𐐐𐐏𐐤𐐆𐐤",
    "Cuneiform": "𒀭𒂗𒆤 𒈗",
    "Hieroglyphs": "𓂀𓃀𓆓𓏏",
    "Adlam": "𞤋𞤲𞥆𞤢𞤥𞤢",
    "Mathematics": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, 𝔸𝕓𝖈 ∑∫√",
    "Braille": "⠠⠁⠇⠇ ⠓⠥⠍⠁⠝",
    "Emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇳 🫠 1️⃣ ❤️‍🔥",
    "Combining": "e\u0301a\u0308\u0304 Z̸̢̛ą̶l̷g̵o̴ q\u0307\u0323 ก็ นำ้",
}


def test_there_are_more_than_forty_scripts() -> None:
    assert len(SCRIPTS) >= 40


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_token_shows_a_broken_character(script: str, qwen: Any) -> None:
    """Cut after every token: what was shown is a beginning of the text, short of it by less than one character."""
    text = qwen.tokenizer.backend_tokenizer.normalizer.normalize_str(SCRIPTS[script])
    ids = encode(qwen.tokenizer, text)
    stream, shown, data = ThinkingStream(qwen), "", b""
    for token in ids:
        shown += "".join(piece.text for piece in stream.push(token))
        data += qwen.pieces[token]
        assert text.startswith(shown)
        assert "\ufffd" not in shown
        assert shown == data.decode("utf-8", "ignore")
        # What the device knows of the token is what the text is short of.
        lacking = missing_bytes(data)
        assert bool(lacking) == (len(shown.encode()) < len(data))
    assert shown == text


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_look_up_table_follows_the_text(script: str, qwen: Any) -> None:
    """The bytes that are missing, kept from token to token as the op does, at any start, against the whole text."""
    data = SCRIPTS[script].encode()
    single = [next(i for i, p in enumerate(qwen.pieces) if p == bytes([b])) for b in range(256)]
    rng, need, i = random.Random(1), 0, 0
    by_bytes = {piece: i for i, piece in enumerate(qwen.pieces[:151643])}
    while i < len(data):
        size = next((n for n in (rng.randint(1, 5), 2) if data[i : i + n] in by_bytes), 1)
        token = by_bytes.get(data[i : i + size], single[data[i]])
        i += len(qwen.pieces[token])
        bits = int(qwen.lut[token])
        number = (bits & Bit.MISSING) >> MISSING_SHIFT
        need = max(need - number, 0) if bits & Bit.CONTINUES else number
        assert need == missing_bytes(data[:i])


def test_facts_of_the_real_vocabulary(qwen: Any) -> None:
    lut = qwen.lut[:151643]
    continues = (lut & int(Bit.CONTINUES)) != 0
    assert len(qwen.lut) == 151936
    assert int(((lut & int(Bit.NEWLINE)) != 0).sum()) == 2178
    assert int(((lut & int(Bit.PARAGRAPH)) != 0).sum()) == 564
    assert int((((lut & int(Bit.MISSING)) != 0) & ~continues).sum()) == 1271
    for token in (198, 271, 624, 382):
        assert lut[token] & Bit.NEWLINE
    for token in (14190, 13824, 3783, 80022, 88190, 92014):
        assert lut[token] & Bit.REFLECTION
    for token in (624, 382, 13, 1773):
        assert lut[token] & Bit.SENTENCE
    assert token_bytes(qwen.tokenizer)[151667] == b"<think>"


def test_parts_are_told_apart_by_tokens(qwen: Any) -> None:
    """The text `</think>` written letter by letter is text."""
    spelled = [i for c in "</think>" for i in encode(qwen.tokenizer, c)]
    ids = [
        qwen.start,
        198,
        *encode(qwen.tokenizer, "hm"),
        *spelled,
        qwen.end,
        271,
        *encode(qwen.tokenizer, "42"),
        151645,
    ]
    stream = ThinkingStream(qwen)
    pieces = [piece for token in ids for piece in stream.push(token)]
    assert "".join(p.text for p in pieces if p.part == "thinking") == "\nhm</think>"
    assert "".join(p.text for p in pieces if p.part == "answer") == "\n\n42"
    assert ThinkingStream(qwen).split(ids) == ("\nhm</think>", "\n\n42")
    assert ThinkingStream(qwen, [qwen.turn, qwen.start, 198]).split(ids[2:])[0] == "hm</think>"


def test_half_a_character_is_dropped_at_a_marker(qwen: Any) -> None:
    half = next(i for i, piece in enumerate(qwen.pieces) if piece == b"\xe5\xa5")
    stream = ThinkingStream(qwen, [qwen.turn, qwen.start])
    assert stream.push(half) == []
    assert stream.push(qwen.end) == []
    assert stream.push(encode(qwen.tokenizer, "a")[0]) == [Piece("a", "answer")]


def test_a_tool_call_ends_the_thinking_and_is_shown(qwen: Any) -> None:
    stream = ThinkingStream(qwen, [qwen.turn, qwen.start])
    assert stream.part_of(100) == "thinking"
    assert stream.push(qwen.tool) == [Piece("<tool_call>", "answer")]
    assert stream.part_of(100) == "answer"
    assert stream.push(151900) == []


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    stream = Utf8Stream()
    assert stream.push(b"\xe5\xa5") == ""
    assert stream.push(b"A") == "\ufffdA"
    assert stream.push(b"\xf0\x9f") == ""
    assert stream.close() == ""
    assert stream.push(b"B") == "B"
