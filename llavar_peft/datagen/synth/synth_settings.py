"""What is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from llavar_peft.errors import ConfigError

Style: TypeAlias = Literal["detailed", "plain"]
SynthKind: TypeAlias = Literal["receipts", "covers", "signs", "posters", "documents"]
Level: TypeAlias = Literal["none", "light", "heavy"]
Task: TypeAlias = Literal["transcribe", "question", "conversation"]

KINDS: Final[dict[Style, tuple[SynthKind, ...]]] = {
    "detailed": ("receipts", "covers", "signs", "documents", "posters"),
    "plain": ("signs", "covers", "posters", "receipts"),
}
"""The kinds of image that each style has, in the order in which they take turns."""

LEAST_PLAIN: Final = 192
"""Least length of a plain image's longer side in pixels."""

_WIDTHS: Final[dict[Style, int]] = {"detailed": 768, "plain": 448}


@dataclass(frozen=True, kw_only=True)
class SynthSettings:
    """What is drawn. Images are the same with the same settings, whatever their number and the order of drawing.

    Attributes:
        style: ``"detailed"``: small print and words of a language; ``"plain"``: few large letters, random strings.
        kinds: Which take turns; none for all of the style.
        seed: Another one gives other images.
        width: Of each image in pixels; of a plain one the most that its longer side has. None: 768, plain 448.
        distort: What a camera does to it.
        languages: Which take turns, each after all kinds.
        fonts: A folder of further fonts.
        task: What a record asks: all text, one question, or all questions as a conversation.

    Raises:
        ConfigError: The style has no such kind, or cannot be drawn so.
    """

    style: Style = "detailed"
    kinds: tuple[SynthKind, ...] = ()
    seed: int = 0
    width: int | None = None
    distort: Level = "none"
    languages: tuple[str, ...] = ("en",)
    fonts: Path | None = None
    task: Task = "transcribe"

    def __post_init__(self) -> None:
        """Reject what does not exist, and what the style does not have."""
        _choose("style", self.style, tuple(KINDS))
        _choose("distort", self.distort, get_args(Level))
        _choose("task", self.task, get_args(Task))
        for kind in self.kinds:
            _choose(f"kind of the style {self.style}", kind, KINDS[self.style])
        if self.style == "detailed":
            return
        if self.languages != ("en",):
            raise ConfigError.at("language", "plain pictures are English", "leave it out, or draw detailed ones")
        if self.fonts is not None:
            raise ConfigError.at("fonts", "plain pictures have their own", "leave it out, or draw detailed ones")
        if self.pixels < LEAST_PLAIN:
            raise ConfigError.at("width", f"is {self.pixels}", f"give plain pictures {LEAST_PLAIN} or more")

    @property
    def turns(self) -> tuple[SynthKind, ...]:
        """The kinds that take turns."""
        return self.kinds or KINDS[self.style]

    @property
    def pixels(self) -> int:
        """The width, or the style's own."""
        return _WIDTHS[self.style] if self.width is None else self.width


def _choose(where: str, value: str, there: tuple[str, ...]) -> None:
    if value not in there:
        raise ConfigError.at(where, f"is {value!r}", f"use one of {', '.join(there)}")
