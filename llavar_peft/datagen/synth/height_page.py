"""A synthetic image whose letters have a given height in the prepared image."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Final

from llavar_peft.data.letter_canvas import LetterCanvas, whole_canvas
from llavar_peft.datagen.synth.drawn_page import DrawnPage, draw_page
from llavar_peft.datagen.synth.scene import Quad
from llavar_peft.datagen.synth.synth_record import measure_page
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.errors import ConfigError

_ATTEMPTS: Final = 50
_FAR: Final = 1_000_003  # images; beyond the numbers of a data set, so that a second attempt is no other image of it


def draw_at_height(settings: SynthSettings, index: int) -> DrawnPage:
    """Draw the image with a given number on a larger square, on which its letters have one of the heights.

    The letters are those of the first answer; where they are too low even if the image fills the square, another image
    of the same kind is drawn.

    Raises:
        ConfigError: No image of this kind has letters of this height.
    """
    heights = settings.heights
    block, number = divmod(index, len(heights))
    height = Random(f"heights/{settings.seed}/{block}").sample(heights, len(heights))[number]
    rng = Random(f"place/{settings.seed}/{index}")
    largest = 0.0
    for attempt in range(_ATTEMPTS):
        other = attempt * _FAR * len(settings.turns) * len(settings.languages)
        page = draw_page(settings, index + other)
        letters = measure_page(page, settings)["text_height"]
        canvas = whole_canvas(page.image.size, letters, height, settings.side, place=(rng.random(), rng.random()))
        if canvas is not None:
            return _placed(page, canvas, height, settings.side)
        largest = max(largest, letters * settings.side / max(page.image.size))
    raise ConfigError.at(
        "--heights",
        f"{page.kind} of the style {settings.style} have no letters of {height:g} px in an image of {settings.side} px "
        f"(got at most {largest:.1f} px in {_ATTEMPTS} images)",
        "use lower heights or --style plain" if settings.style == "detailed" else "use lower heights",
    )


def _placed(page: DrawnPage, canvas: LetterCanvas, height: float, side: int) -> DrawnPage:
    def move(quad: Quad) -> Quad:
        first, second, third, fourth = (canvas.move(*corner) for corner in quad)
        return first, second, third, fourth

    lines = [
        replace(
            line,
            size=max(1, round(line.size * canvas.scale)),
            left=round(canvas.move(line.left, 0)[0]),
            baseline=round(canvas.move(0, line.baseline)[1]),
        )
        for line in page.lines
    ]
    return replace(
        page,
        image=canvas.show(page.image),
        lines=tuple(lines),
        quads=tuple(map(move, page.quads)),
        letters=(int(height) if height == int(height) else height, side),
    )
