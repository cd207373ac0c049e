"""How the VQA benchmark evens out spelling before answers are compared.

Written from its published description: lower case; full stops dropped except in decimals; number words as digits;
articles dropped; a missing apostrophe put back; other punctuation a space, or nothing.

Source: visualqa.org/evaluation.html; MultimodalOCR, ``VQAEval``, which LLaVAR's numbers were taken with.
"""

from __future__ import annotations

import re
from typing import Final

_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
"""All but the apostrophe, which tells a possessive from a plural, the colon, which stands in times, and ``.``."""
_NUMBER_BETWEEN_COMMAS: Final = re.compile(r"\d,\d")
_FULL_STOP: Final = re.compile(r"\.(?!\d)")
_FULL_STOPS_DROPPED: Final = 32
"""Both programs hand ``re.UNICODE``, whose value this is, to ``sub`` where it takes the number of replacements."""

_ARTICLES: Final = frozenset({"a", "an", "the"})
_DIGITS: Final = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip

# Those of "I" are missing: the programs look for them in capitals, after lowering.
_CONTRACTIONS: Final = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_RESTORED: Final = {
    **{damaged: word for word in _CONTRACTIONS.split() for damaged in _without_one_apostrophe(word)},
    "somebody'd": "somebodyd",  # the wrong way round there, on both sides alike
}


def normalise(text: str) -> str:
    """Normalises an answer or a truth.

    The programs' own ways are kept, since published numbers depend on them: a sign is dropped, not turned into a space,
    where it stands beside a space anywhere in the text, or where the text has a comma between digits; only the first 32
    full stops are dropped; ``none`` is the number 0.

    Args:
        text: As answered or annotated.

    Returns:
        Words joined by single spaces; empty where nothing but articles and punctuation was there.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = _NUMBER_BETWEEN_COMMAS.search(text) is not None
    signs = {ord(sign): "" if joined or f"{sign} " in text or f" {sign}" in text else " " for sign in _PUNCTUATION}
    text = _FULL_STOP.sub("", text.translate(signs), count=_FULL_STOPS_DROPPED)
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
