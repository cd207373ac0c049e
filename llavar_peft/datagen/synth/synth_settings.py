"""Settings of synthetic images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from llavar_peft.data.letter_canvas import check_heights
from llavar_peft.errors import ConfigError

Style: TypeAlias = Literal["detailed", "plain"]
SynthKind: TypeAlias = Literal["receipts", "covers", "signs", "posters", "documents", "invoices"]
Level: TypeAlias = Literal["none", "light", "heavy"]
Task: TypeAlias = Literal["transcribe", "question", "conversation", "extract"]

KINDS: Final[dict[Style, tuple[SynthKind, ...]]] = {
    "detailed": ("receipts", "covers", "signs", "documents", "posters"),
    "plain": ("signs", "covers", "posters", "receipts"),
}
"""The kinds of image of each style, in the order in which they alternate."""

FORMS: Final[tuple[SynthKind, ...]] = ("receipts", "invoices")
"""The kinds that have fields. Invoices are drawn only if they are asked for, or for the task ``extract``."""

LEAST_PLAIN: Final = 192
"""Minimum length of a plain image's longer side in pixels."""

_SIDES: Final = (32, 1344)  # pixels
_WIDTHS: Final[dict[Style, int]] = {"detailed": 768, "plain": 448}


@dataclass(frozen=True, kw_only=True)
class SynthSettings:
    """Settings of synthetic images. An image depends only on them and its number, not on the number of images.

    Attributes:
        style: ``"detailed"``: small print and words of a language; ``"plain"``: few large letters, random strings.
        kinds: Kinds of image that alternate; empty for all of the style.
        seed: Seed of all random choices.
        width: Width of each image in pixels; for a plain one the maximum length of its longer side. None for the
            style's default, 768 or 448 for plain images.
        distort: Strength of the camera's distortions.
        languages: Languages that alternate, each for one round of kinds.
        fonts: A folder of additional fonts.
        task: What a record asks for: all text, one question, all questions as a conversation, or the fields as JSON.
        heights: Heights in pixels that the letters of the first answer have in the prepared image, each for the same
            number of images, in random order; empty leaves the letters as they are drawn.
        side: Side of the prepared image in pixels, for ``heights``.

    Raises:
        ConfigError: A value is invalid, or not available for the style.
    """

    style: Style = "detailed"
    kinds: tuple[SynthKind, ...] = ()
    seed: int = 0
    width: int | None = None
    distort: Level = "none"
    languages: tuple[str, ...] = ("en",)
    fonts: Path | None = None
    task: Task = "transcribe"
    heights: tuple[float, ...] = ()
    side: int = 336

    def __post_init__(self) -> None:
        """Check the values, and that the style supports them."""
        _check_choice("style", self.style, tuple(KINDS))
        _check_choice("distort", self.distort, get_args(Level))
        _check_choice("task", self.task, get_args(Task))
        for kind in self.kinds:
            _check_choice(f"kind of the style {self.style}", kind, (*KINDS[self.style], "invoices"))
            if self.task == "extract":
                _check_choice("kind for the task extract", kind, FORMS)
        if self.heights:
            check_heights(self.heights, "heights")
        if not _SIDES[0] <= self.side <= _SIDES[1]:
            raise ConfigError.at(
                "--side", f"got {self.side}, expected {_SIDES[0]} to {_SIDES[1]} pixels", "use the vision tower's side"
            )
        if self.style == "detailed":
            return
        if self.languages != ("en",):
            raise ConfigError.at("language", "plain images are in English", "omit it, or use the detailed style")
        if self.fonts is not None:
            raise ConfigError.at("fonts", "plain images use fixed fonts", "omit it, or use the detailed style")
        if self.pixels < LEAST_PLAIN:
            raise ConfigError.at(
                "width", f"too small (got {self.pixels})", f"use at least {LEAST_PLAIN} for plain images"
            )

    @property
    def turns(self) -> tuple[SynthKind, ...]:
        """The kinds that alternate."""
        return self.kinds or (FORMS if self.task == "extract" else KINDS[self.style])

    @property
    def pixels(self) -> int:
        """The width, or the style's default."""
        return _WIDTHS[self.style] if self.width is None else self.width


def _check_choice(where: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError.at(where, f"unknown (got {value!r})", f"use one of {', '.join(choices)}")
