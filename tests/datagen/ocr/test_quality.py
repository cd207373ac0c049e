"""The quality filter's reasons, and the detection of copies."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from llavar_peft.datagen.ocr.duplicate_images import (
    BITS,
    NEAR,
    Candidate,
    _near_pairs,
    difference_hash,
    find_duplicates,
    is_blank,
    is_copy,
)
from llavar_peft.datagen.ocr.ocr_lines import OcrLine
from llavar_peft.datagen.ocr.ocr_quality import QualityLimits, disagreement, judge_quality, script_share
from llavar_peft.datagen.ocr.similar_texts import _by_pieces, agree, similar_texts
from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.synth_settings import SynthKind, SynthSettings


def line(text: str, confidence: float = 0.9, top: float = 0) -> OcrLine:
    return OcrLine(text, ((0, top), (100, top), (100, top + 20), (0, top + 20)), confidence)


LATIN = QualityLimits(script="LATIN")
CASES = [
    ([line("GRAND OPENING")], QualityLimits(), None),
    ([], QualityLimits(), "no_text"),
    ([line("--- !!")], QualityLimits(), "no_text"),
    ([line("GRAND", 0.9), line("OPENINGS", 0.2, 100)], QualityLimits(), "low_confidence"),
    ([line("GRAND OPENING", 0.9), line("xyz", 0.2, 100)], QualityLimits(), None),
    ([line("42")], QualityLimits(), "few_letters"),
    ([line("42")], QualityLimits(min_letters=2), None),
    ([line("Hello мир и дом")], LATIN, "other_script"),
    ([line("Grüße aus Øster")], LATIN, None),
    ([line("2024 15:30")], LATIN, None),
    ([line("write <image> here")], QualityLimits(), "reserved_text"),
]


@pytest.mark.parametrize(("lines", "limits", "reason"), CASES)
def test_reasons(lines: list[OcrLine], limits: QualityLimits, reason: str | None) -> None:
    assert judge_quality(lines, limits).reason == reason


def test_uncertain_lines_are_left_out_and_counted() -> None:
    verdict = judge_quality([line("SOLD OUT TODAY"), line("qx", 0.1, 100)], QualityLimits())
    assert (verdict.text, verdict.lines, verdict.left_out) == ("SOLD OUT TODAY", 1, 1)


def test_two_engines_must_agree() -> None:
    read = [line("GRAND OPENING")]
    assert judge_quality(read, QualityLimits(), [line("GRAND 0PENING")]).reason is None
    verdict = judge_quality(read, QualityLimits(), [line("nothing alike")])
    assert verdict.reason == "engines_disagree"
    assert "character error rate" in verdict.detail
    assert judge_quality(read, QualityLimits(), []).reason == "engines_disagree"
    assert judge_quality(read, QualityLimits(max_disagreement=1.0), []).reason is None


@given(st.text(), st.text())
def test_disagreement_is_a_distance(first: str, second: str) -> None:
    assert 0 <= disagreement(first, second) == disagreement(second, first) <= 1
    assert disagreement(first, first) == 0
    assert disagreement(f" {first}\n", first) == 0


def test_scripts() -> None:
    assert script_share("abc где", "LATIN") == 0.5
    assert script_share("12", "LATIN") == 1.0
    assert script_share("日本 ab", "CJK") == 0.5


def image(kind: SynthKind, index: int) -> Image.Image:
    return draw_page(SynthSettings(style="plain", kinds=(kind,)), index).image


def test_a_copy_has_nearly_the_same_hash() -> None:
    for index in range(6):
        drawn = image("posters", index)
        scaled = drawn.resize((drawn.width * 3 // 4, drawn.height * 3 // 4), Image.Resampling.LANCZOS)
        assert (difference_hash(drawn) ^ difference_hash(scaled)).bit_count() <= NEAR
        assert (difference_hash(drawn) ^ difference_hash(image("posters", index + 1))).bit_count() > NEAR


def near(value: int, bits: int, rng: Random) -> int:
    for place in rng.sample(range(BITS), bits):
        value ^= 1 << place
    return value


def test_copies_have_near_hashes_and_equal_texts() -> None:
    rng = Random(0)
    first, other = rng.getrandbits(BITS), rng.getrandbits(BITS)
    images = [
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
        rng.shuffle(images)
        assert find_duplicates(images) == expected


INVOICE = "Miller and Sons Ltd\nInvoice No. 4711 12.03.2026\nPaper 12.50\nDesk lamp 31.00\nTOTAL 43.50"
POSTER = "Jazz Night\n14 June 2026\nTown Hall, Main Street\nTickets 7.50"


@pytest.mark.parametrize(
    ("text", "old", "new", "copy"),
    [
        (INVOICE, "4711", "4712", False),
        (INVOICE, "12.03.2026", "13.03.2026", False),
        (INVOICE, "43.50", "143.50", False),
        (POSTER, "14 June", "15 June", False),
        (POSTER, "June", "March", False),
        (POSTER, "Town Hall", "Arena", False),
        (POSTER, "2026", "2027", False),
        (POSTER, POSTER, POSTER.replace("14", "7").replace("7.50", "14.50"), False),
        (INVOICE.replace("4711", "AB4711"), "4711", "4712", False),
        (INVOICE, "Miller and Sons", "MilIer amd Sons", True),  # letters mistaken
        (INVOICE, "31.00", "31.OO", True),
        (INVOICE, "31.00", "3l.00", True),
        (POSTER, "Tickets 7.50", "Tickets", True),  # small print not read
        (POSTER, "Jazz Night", "JazzNight", True),
        (POSTER, "Street", "Stre et", True),
    ],
)
def test_a_copy_differs_in_mistakes_only(text: str, old: str, new: str, copy: bool) -> None:
    assert is_copy(text, text.replace(old, new)) is copy
    assert is_copy(text.replace(old, new), text) is copy


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), max_size=20), st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(drawn: list[tuple[int, int]], rng: Random) -> None:
    images = [
        Candidate(f"{number}.png", size, (1 << bits) - 1, "the same") for number, (bits, size) in enumerate(drawn)
    ]
    found = find_duplicates(images)
    rng.shuffle(images)
    assert find_duplicates(images) == found
    assert not {*found} & {*found.values()}


def quadratic(images: list[Candidate]) -> dict[str, str]:
    """Apply the definition: compare all pairs, then form groups."""
    ordered = sorted(images, key=lambda one: (-one.pixels, one.path))
    groups = [{number} for number in range(len(ordered))]
    for first, second in combinations(range(len(ordered)), 2):
        one, other = ordered[first], ordered[second]
        near = (one.hash ^ other.hash).bit_count() <= NEAR
        if near and is_copy(one.text, other.text):
            joined = groups[first] | groups[second]
            for number in joined:
                groups[number] = joined
    return {ordered[n].path: ordered[min(group)].path for n, group in enumerate(groups) if n != min(group)}


@given(st.lists(st.text("ab", max_size=24) | st.text("abcdé", max_size=12), max_size=12))
def test_pieces_miss_no_texts_that_agree(texts: list[str]) -> None:
    ordered = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    found = {tuple(sorted(pair)) for pair in _by_pieces(ordered, texts)}
    assert {pair for pair in combinations(range(len(texts)), 2) if agree(texts[pair[0]], texts[pair[1]])} <= found


@given(st.integers(0, 1 << 32))
@settings(max_examples=12)
def test_copies_equal_those_found_by_comparing_all_pairs(seed: int) -> None:
    """Pages of a few kinds, most of them almost blank, with texts of all lengths and hashes near the limit."""
    rng = Random(seed)
    kinds = [0, 0, 0, rng.getrandbits(BITS), rng.getrandbits(40)]
    said = ["".join(rng.choices("abc ", k=rng.choice((0, 5, 9, 20, 60)))) for _ in range(30)]
    images = []
    for number in range(150):
        text = list(rng.choice(said))
        for _ in range(rng.choice((0, 1, 3))):
            text.insert(rng.randint(0, len(text)), rng.choice("abcd"))
        flipped = sum(1 << bit for bit in rng.sample(range(BITS), rng.choice((0, 2, 6, 7, 13))))
        images.append(Candidate(f"{number:03}", rng.randint(1, 3), rng.choice(kinds) ^ flipped, "".join(text)))
    assert find_duplicates(images) == quadratic(images)


def test_pages_that_are_almost_blank_are_not_all_compared() -> None:
    """Pages with a few different words each, and dense pages with the same white margin."""
    rng = Random(0)
    texts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(5, 30))) for _ in range(3000)]
    assert sum(1 for _ in similar_texts(range(3000), texts)) < 3000 * 30
    margin = (1 << 64) - 1
    hashes = [rng.getrandbits(BITS) & ~margin for _ in range(3000)]
    assert sum(1 for _ in _near_pairs(hashes, ["x" * 900] * 3000)) == 0


def test_an_empty_page_is_distinguished_from_one_with_little_text() -> None:
    page = Image.new("RGB", (1000, 1400), (250, 248, 244))
    assert is_blank(page)
    noisy = Image.effect_noise((1000, 1400), 8).convert("RGB")
    assert is_blank(noisy)
    ImageDraw.Draw(page).text((500, 1350), "12", (40, 40, 40), ImageFont.load_default(24))
    assert not is_blank(page)
