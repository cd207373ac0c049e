"""Colours that can be told apart."""

from __future__ import annotations

from random import Random
from typing import Final, TypeAlias

Colour: TypeAlias = tuple[int, int, int]

_LEAST_CONTRAST: Final = 110


def draw_colours(rng: Random) -> tuple[Colour, Colour]:
    """Choose a background and an ink.

    Args:
        rng: Where the choice comes from.

    Returns:
        Background and ink, whose brightness differs by at least 110 of 255.
    """
    while True:
        background, ink = _colour(rng), _colour(rng)
        if rng.random() < 0.4:
            background, ink = rng.choice((((250, 250, 245), (20, 20, 24)), ((15, 18, 30), (245, 245, 240))))
        if abs(_luma(background) - _luma(ink)) >= _LEAST_CONTRAST:
            return background, ink


def draw_paper(rng: Random) -> tuple[Colour, Colour]:
    """Choose white or nearly so, with dark ink."""
    shade = rng.randint(232, 255)
    dark = rng.randint(10, 70)
    return (shade, shade, shade - rng.randint(0, 14)), (dark, dark, dark)


def _luma(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _colour(rng: Random) -> Colour:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)
