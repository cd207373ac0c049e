"""What is kept, what is dropped and why; what counts as a copy."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llavar_peft.data.ocr.duplicates import BITS, NEAR, Candidate, difference_hash, find_duplicates
from llavar_peft.data.ocr.lines import OcrLine
from llavar_peft.data.ocr.quality import Limits, disagreement, judge, script_share
from llavar_peft.data.synthetic import draw_picture


def line(text: str, confidence: float = 0.9, top: float = 0) -> OcrLine:
    return OcrLine(text, ((0, top), (100, top), (100, top + 20), (0, top + 20)), confidence)


LATIN = Limits(script="LATIN")
CASES = [
    ([line("GRAND OPENING")], Limits(), None),
    ([], Limits(), "no_text"),
    ([line("--- !!")], Limits(), "no_text"),
    ([line("GRAND", 0.9), line("OPENINGS", 0.2, 100)], Limits(), "low_confidence"),
    ([line("GRAND OPENING", 0.9), line("xyz", 0.2, 100)], Limits(), None),
    ([line("42")], Limits(), "few_letters"),
    ([line("42")], Limits(min_letters=2), None),
    ([line("Hello мир и дом")], LATIN, "other_script"),
    ([line("Grüße aus Øster")], LATIN, None),
    ([line("2024 15:30")], LATIN, None),
    ([line("write <image> here")], Limits(), "reserved_text"),
]


@pytest.mark.parametrize(("lines", "limits", "reason"), CASES)
def test_reasons(lines: list[OcrLine], limits: Limits, reason: str | None) -> None:
    assert judge(lines, limits).reason == reason


def test_uncertain_lines_are_left_out_and_counted() -> None:
    verdict = judge([line("SOLD OUT TODAY"), line("qx", 0.1, 100)], Limits())
    assert (verdict.text, verdict.lines, verdict.left_out) == ("SOLD OUT TODAY", 1, 1)


def test_two_engines_must_agree() -> None:
    read = [line("GRAND OPENING")]
    assert judge(read, Limits(), [line("GRAND 0PENING")]).reason is None
    verdict = judge(read, Limits(), [line("nothing alike")])
    assert verdict.reason == "engines_disagree"
    assert "character error rate" in verdict.detail
    assert judge(read, Limits(), []).reason == "engines_disagree"
    assert judge(read, Limits(max_disagreement=1.0), []).reason is None


@given(st.text(), st.text())
def test_disagreement_is_a_distance(first: str, second: str) -> None:
    assert 0 <= disagreement(first, second) == disagreement(second, first) <= 1
    assert disagreement(first, first) == 0
    assert disagreement(f" {first}\n", first) == 0


def test_scripts() -> None:
    assert script_share("abc где", "LATIN") == 0.5
    assert script_share("12", "LATIN") == 1.0
    assert script_share("日本 ab", "CJK") == 0.5


def picture(kind: str, index: int) -> Image.Image:
    return draw_picture(kind, 0, index).image


def test_a_copy_has_nearly_the_same_hash() -> None:
    for index in range(6):
        image = picture("poster", index)
        scaled = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
        assert (difference_hash(image) ^ difference_hash(scaled)).bit_count() <= NEAR
        assert (difference_hash(image) ^ difference_hash(picture("poster", index + 1))).bit_count() > NEAR


def near(value: int, bits: int, rng: Random) -> int:
    for place in rng.sample(range(BITS), bits):
        value ^= 1 << place
    return value


def test_copies_are_near_and_say_the_same() -> None:
    rng = Random(0)
    first, other = rng.getrandbits(BITS), rng.getrandbits(BITS)
    pictures = [
        Candidate("small.png", 100, near(first, NEAR, rng), "GRAND OPENING TODAY"),
        Candidate("large.png", 400, first, "GRAND OPENING TODAY"),
        Candidate("equal.png", 400, first, "GRAND 0PENING TODAY"),
        Candidate("page2.png", 400, first, "another page of the same book"),
        Candidate("far.png", 400, near(first, NEAR + 1, rng), "GRAND OPENING TODAY"),
        Candidate("else.png", 400, other, "GRAND OPENING TODAY"),
    ]
    # equal.png comes before large.png by name, and is as large.
    expected = {"small.png": "equal.png", "large.png": "equal.png"}
    for _ in range(8):
        rng.shuffle(pictures)
        assert find_duplicates(pictures) == expected


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), max_size=20), st.randoms(use_true_random=False))
def test_the_order_of_pictures_does_not_matter(drawn: list[tuple[int, int]], rng: Random) -> None:
    pictures = [
        Candidate(f"{number}.png", size, (1 << bits) - 1, "the same") for number, (bits, size) in enumerate(drawn)
    ]
    found = find_duplicates(pictures)
    rng.shuffle(pictures)
    assert find_duplicates(pictures) == found
    assert not {*found} & {*found.values()}
