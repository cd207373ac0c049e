"""The profile of an image, from lines found in it; no engine runs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from llavar_peft.datagen.ocr.page_profile import PAPER_EDGE, choose_profile
from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.synth_settings import Level, SynthKind, SynthSettings


@pytest.mark.parametrize("distort", ["none", "heavy"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("receipts", "page"),
        ("documents", "page"),
        ("invoices", "page"),
        ("signs", "scene"),
        ("covers", "scene"),
        ("posters", "scene"),
    ],
)
def test_drawn_kinds(kind: SynthKind, expected: str, distort: Level) -> None:
    for number in range(3):
        page = draw_page(SynthSettings(kinds=(kind,), distort=distort, seed=60), number)
        scale = PAPER_EDGE / min(page.image.size)
        small = page.image.resize((round(page.image.width * scale), round(page.image.height * scale)))
        # A box of RapidOCR is about 1.4 times as high as the letters.
        boxes = [
            tuple(
                (x * scale, (y + lift * 0.2 * (quad[3][1] - quad[0][1])) * scale)
                for (x, y), lift in zip(quad, (-1, -1, 1, 1), strict=True)
            )
            for quad in page.quads
        ]
        assert choose_profile(small, boxes) == expected  # type: ignore[arg-type]


def _box(left: float, top: float, width: float, height: float) -> tuple[tuple[float, float], ...]:
    return (left, top), (left + width, top), (left + width, top + height), (left, top + height)


def test_many_signs_in_a_street_are_a_scene_and_a_few_small_lines_on_paper_a_page() -> None:
    rough = np.random.default_rng(0).integers(0, 256, (PAPER_EDGE, 500, 3), dtype=np.uint8)
    street = Image.fromarray(rough).resize((500, PAPER_EDGE))
    signs = [_box(20 + 110 * (number % 4), 20 + 110 * (number // 4), 80, 22) for number in range(12)]
    for left_top, _, right_bottom, _ in signs:
        ImageDraw.Draw(street).rectangle((*left_top, *right_bottom), fill=(20, 60, 20))
    assert choose_profile(street, signs) == "scene"  # type: ignore[arg-type]
    paper = Image.new("RGB", (PAPER_EDGE, 540), "white")
    assert choose_profile(paper, [_box(40, 100, 200, 11), _box(40, 480, 20, 10)]) == "page"  # type: ignore[list-item]
    assert choose_profile(paper, []) == "scene"
