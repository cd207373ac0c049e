"""One synthetic image with its ground truth, drawn from the settings, the seed and its number alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from llavar_peft.datagen.synth.detailed_style import draw_detailed
from llavar_peft.datagen.synth.font_faces import list_faces
from llavar_peft.datagen.synth.plain_style import draw_plain
from llavar_peft.datagen.synth.scene import PlacedLine, Quad, Scene
from llavar_peft.datagen.synth.synth_settings import Level, SynthKind, SynthSettings
from llavar_peft.datagen.synth.vocabulary import load_vocabulary


@dataclass(frozen=True, kw_only=True)
class DrawnPage:
    """An image and its ground truth.

    Attributes:
        number: Its number, from which it was drawn.
        image: RGB; a photographed one before compression.
        lines: The text, in reading order.
        quads: Corners of each line's ink in the image, clockwise from the top left, in pixels.
        questions: Questions about the image with their answers.
        quality: JPEG quality of the file; None for PNG.
        fields: What a form states, by name, as printed; empty for other kinds.
        letters: Height in pixels that the letters of the first answer have in the prepared image, and the side of
            that image, if they were asked for.
    """

    number: int
    image: Image.Image
    kind: SynthKind
    language: str
    lines: tuple[PlacedLine, ...]
    quads: tuple[Quad, ...]
    questions: tuple[tuple[str, str], ...]
    quality: int | None
    letters: tuple[float, int] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def transcript(self) -> str:
        """All text in reading order, one paragraph per line."""
        blocks = groupby(self.lines, key=lambda line: line.block)
        return "\n".join(" ".join(line.text for line in block) for _, block in blocks)

    def encoded(self) -> tuple[str, bytes]:
        """Return the extension and the bytes of the image's file."""
        file = io.BytesIO()
        if self.quality is None:
            self.image.save(file, "PNG", compress_level=1)  # half the time of the default, a sixth larger
            return ".png", file.getvalue()
        self.image.save(file, "JPEG", quality=self.quality)
        return ".jpg", file.getvalue()


def draw_page(settings: SynthSettings, index: int) -> DrawnPage:
    """Draw the image with a given number.

    Raises:
        ConfigError: A language has no vocabulary.
        DataError: No font has all letters of a language, or a font cannot be read.
    """
    kind = settings.turns[index % len(settings.turns)]
    language = settings.languages[index // len(settings.turns) % len(settings.languages)]
    rng, scene = _invent(settings, kind, language, index)
    image, quads, quality = _distort(*scene.draw(), settings.distort, rng)
    return DrawnPage(
        number=index,
        image=image,
        kind=kind,
        language=language,
        lines=tuple(scene.lines),
        quads=tuple(quads),
        questions=tuple(scene.questions),
        quality=quality,
        fields=scene.fields,
    )


def _invent(settings: SynthSettings, kind: SynthKind, language: str, index: int) -> tuple[Random, Scene]:
    """Return the scene, and the random generator in the state after inventing it."""
    if settings.style == "plain":
        # The singular is part of the seed: changing it would change all images.
        rng = Random(f"{kind.removesuffix('s')}/{settings.seed}/{index}")
        return rng, draw_plain(kind, rng, settings.pixels)
    rng = Random(f"{kind}/{language}/{settings.seed}/{index}")
    words = load_vocabulary(language)
    return rng, draw_detailed(kind, rng, settings.pixels, words, _faces(settings.fonts, words.alphabet))


def _distort(
    page: Image.Image, quads: list[Quad], level: Level, rng: Random
) -> tuple[Image.Image, list[Quad], int | None]:
    """Return the photograph of a page, the lines' corners in it, and its JPEG quality."""
    if level == "none":
        return page, quads, None
    # Imported late because it imports numpy, whose threads would prevent write_synthetic from forking.
    from llavar_peft.datagen.synth.camera_distortion import draw_camera, move_quads, photograph

    camera = draw_camera(level, rng, *page.size)
    return photograph(page, camera), move_quads(quads, page.size, camera), camera.quality


@lru_cache(maxsize=16)
def _faces(fonts: Path | None, alphabet: str) -> tuple[str, ...]:
    return list_faces(fonts, alphabet)
