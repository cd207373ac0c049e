"""Merging lines into paragraphs: layouts with a known result, and properties of any page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavar_peft.datagen.ocr.merge_paragraphs import merge_lines
from llavar_peft.datagen.ocr.ocr_lines import OcrLine
from llavar_peft.datagen.ocr.ocr_quality import transcribe
from llavar_peft.datagen.synth.drawn_page import DrawnPage, draw_page
from llavar_peft.datagen.synth.synth_settings import Level, Style, SynthKind, SynthSettings


def line(text: str, left: float, top: float, width: float = 200, height: float = 20) -> OcrLine:
    right, bottom = left + width, top + height
    return OcrLine(text, ((left, top), (right, top), (right, bottom), (left, bottom)), 0.9)


def texts(lines: Sequence[OcrLine]) -> list[str]:
    return [paragraph.text for paragraph in merge_lines(lines)]


def moved(one: OcrLine, scale: float = 1, dx: float = 0, dy: float = 0, angle: float = 0) -> OcrLine:
    cosine, sine = math.cos(angle), math.sin(angle)
    corners = [(scale * (x * cosine - y * sine) + dx, scale * (x * sine + y * cosine) + dy) for x, y in one.polygon]
    return OcrLine(one.text, (corners[0], corners[1], corners[2], corners[3]), one.confidence)


TWO_COLUMNS = [
    line("A title across both", 10, 0, 500, 40),
    *(line(f"left{number}", 10, 60 + 26 * number, 230) for number in range(4)),
    *(line(f"left{number}", 10, 190 + 26 * number, 230) for number in range(4, 6)),
    *(line(f"right{number}", 280, 60 + 26 * number, 230) for number in range(3)),
    *(line(f"right{number}", 280, 164 + 26 * number, 230) for number in range(3, 6)),
    line("7", 250, 400, 10),
]
RECEIPT = [
    line("CORNER SHOP", 100, 0, 220, 34),
    *(line(name, 10, 60 + 28 * number, 90) for number, name in enumerate(("Tea", "Milk", "Bread"))),
    *(line(price, 320, 60 + 28 * number, 50) for number, price in enumerate(("1.20", "0.99", "2.50"))),
    line("TOTAL", 10, 170, 90, 28),
    line("4.69", 310, 170, 60, 28),
]
PAGES = {
    "two columns, a title and a page number": (
        TWO_COLUMNS,
        [
            "A title across both",
            "left0 left1 left2 left3",
            "left4 left5",
            "right0 right1 right2",
            "right3 right4 right5",
            "7",
        ],
    ),
    "a receipt is read row by row": (RECEIPT, ["CORNER SHOP", "Tea 1.20\nMilk 0.99\nBread 2.50", "TOTAL 4.69"]),
    "pieces of one line": ([line("PARKING", 110, 2, 100), line("NO", 60, 0, 40)], ["NO PARKING"]),
    "large letters are no part of small ones": (
        [line("SALE", 0, 0, 200, 60), line("until Monday", 0, 62, 150, 18)],
        ["SALE", "until Monday"],
    ),
    "far lines are two paragraphs": ([line("one", 0, 0), line("two", 0, 60)], ["one", "two"]),
    "a poster is read from top to bottom": (
        [line("above right", 300, 0), line("below left", 0, 200)],
        ["above right", "below left"],
    ),
    "centred lines": ([line("wide", 0, 0, 300), line("narrow", 100, 26, 100)], ["wide narrow"]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("degrees", [0, 4, -10])
def test_known_layouts(name: str, degrees: float) -> None:
    lines, expected = PAGES[name]
    turned = [moved(one, angle=math.radians(degrees)) for one in lines]
    Random(name).shuffle(turned)
    assert texts(turned) == expected


numbers = st.integers(0, 60).map(lambda value: value * 8)
pages = st.lists(
    st.builds(
        line,
        st.text("abcde", min_size=1, max_size=4),
        numbers,
        numbers,
        st.integers(1, 40).map(lambda value: value * 8),
        st.sampled_from([8, 16, 24]),
    ),
    max_size=24,
)


@given(pages, st.randoms(use_true_random=False))
def test_the_engines_order_does_not_matter(lines: list[OcrLine], rng: Random) -> None:
    shuffled = list(lines)
    rng.shuffle(shuffled)
    assert merge_lines(shuffled) == merge_lines(lines)


@given(pages)
def test_no_line_is_lost_or_repeated(lines: list[OcrLine]) -> None:
    merged = [one for paragraph in merge_lines(lines) for one in paragraph.lines]
    assert sorted(merged, key=repr) == sorted(lines, key=repr)


# Powers of two and integers, so that rounding has no effect.
@given(pages, st.sampled_from([0.25, 2.0, 8.0]), st.integers(-500, 500), st.integers(-500, 500))
def test_moving_and_scaling_change_nothing(lines: list[OcrLine], scale: float, dx: int, dy: int) -> None:
    assert texts([moved(one, scale, dx, dy) for one in lines]) == texts(lines)


def test_a_page_of_many_lines_is_fast() -> None:
    lines = [line(str(number), 210 * (number % 10), 60 * (number // 10), 60) for number in range(600)]
    assert sum(len(paragraph.lines) for paragraph in merge_lines(lines)) == 600


def found(page: DrawnPage, rng: Random) -> list[OcrLine]:
    """Return the lines of a drawn page as an engine finds them: with room around the letters, in any order."""
    lines = []
    for drawn, quad in zip(page.lines, page.quads, strict=True):
        (x0, y0), (x1, y1), _, (x3, y3) = quad
        width, height = math.dist(quad[0], quad[1]), math.dist(quad[0], quad[3])
        along = [0.15 * height * (b - a) / width for a, b in ((x0, x1), (y0, y1))]
        across = [rng.uniform(0.15, 0.3) * (b - a) for a, b in ((x0, x3), (y0, y3))]
        signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        a, b, c, d = (
            (x + i * along[0] + j * across[0], y + i * along[1] + j * across[1])
            for (x, y), (i, j) in zip(quad, signs, strict=True)
        )
        lines.append(OcrLine(drawn.text, (a, b, c, d), 0.9))
    rng.shuffle(lines)
    return lines


FORMS: list[tuple[SynthKind, Style, int | None, Level, str]] = [
    (kind, style, width, distort, "en" if style == "plain" else language)
    for kind in ("receipts", "invoices")
    for style, width, language in (
        ("detailed", 300, "de"),
        ("detailed", 512, "en"),
        ("detailed", 1200, "fr"),
        ("detailed", None, "es"),
        ("plain", None, "en"),
    )
    for distort in ("none", "light", "heavy", "heavy")
]


def test_amounts_follow_what_they_belong_to() -> None:
    """Forty receipts and invoices, half of them photographed from the side."""
    rng = Random(0)
    wrong, rows = [], 0
    for number, (kind, style, width, distort, language) in enumerate(FORMS):
        settings = SynthSettings(
            style=style, kinds=(kind,), width=width, distort=distort, languages=(language,), seed=31
        )
        page = draw_page(settings, number)
        text = transcribe(found(page, rng))
        pairs = re.findall(r"([^\W\d_]+) (\d+\.\d\d)(?=\s|$)", page.transcript)
        rows += len(pairs)
        wrong += [
            (settings, name, amount)
            for name, amount in pairs
            if not re.search(rf"\b{re.escape(name)} {re.escape(amount)}$", text, re.MULTILINE)
        ]
    assert rows > 150
    assert wrong == []


def columns(rng: Random) -> list[OcrLine]:
    """Return the lines of a page of two or three columns of prose, some with a title across them."""
    width, gutter, spacing = rng.choice((240, 300, 420)), rng.uniform(8, 60), rng.uniform(23, 32)
    title, justified, on_grid = (rng.random() < 0.5 for _ in range(3))
    count = rng.choice((2, 3))
    lines = [line("title", 0, 0, count * width + (count - 1) * gutter, 34)] if title else []
    for column in range(count):
        top = 60 + (0 if on_grid else rng.uniform(0, spacing))
        for number in range(rng.randint(6, 18)):
            ends = rng.random() < 0.12
            share = rng.uniform(0.15, 0.9) if ends else 1 if justified else rng.uniform(0.82, 1)
            left = column * (width + gutter)
            text = f"{'abc'[column]}{number:02}"
            lines.append(line(text, left, top + rng.uniform(-1.6, 1.6), share * width, 20 * rng.uniform(0.92, 1.08)))
            top += spacing * (1.5 if ends and rng.random() < 0.5 else 1)
    rng.shuffle(lines)
    return lines


def test_columns_are_not_joined() -> None:
    for seed in range(150):
        lines = columns(Random(seed))
        merged = merge_lines(lines)
        for paragraph in merged:
            assert len({one.text[0] for one in paragraph.lines}) == 1, (seed, paragraph.text)
        order = [one.text for paragraph in merged for one in paragraph.lines if one.text != "title"]
        assert order == sorted(order), seed


def test_a_list_of_options_is_read_row_by_row() -> None:
    options = {"-b, --benchmark": 300, "-s, --strict": 180, "-t, --no-time": 420, "-h, --help": 230}
    lines = [
        line(text, left, 30 * number, width)
        for number, (option, width) in enumerate(options.items())
        for text, left, width in ((option, 0, 9 * len(option)), (f"does {option[1]}", 170, width))
    ]
    assert texts(lines) == ["\n".join(f"{option} does {option[1]}" for option in options)]
