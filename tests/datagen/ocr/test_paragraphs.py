"""Merging lines into paragraphs: layouts with a known result, and properties of any page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavar_peft.datagen.ocr.merge_paragraphs import merge_lines
from llavar_peft.datagen.ocr.ocr_engines import OcrLine


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
    "a receipt is read row by row": (RECEIPT, ["CORNER SHOP", "Tea 1.20 Milk 0.99 Bread 2.50", "TOTAL 4.69"]),
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
