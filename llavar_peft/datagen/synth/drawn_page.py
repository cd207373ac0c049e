"""One image with everything that is known about it, drawn from its settings, seed and number alone."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.datagen.synth.answer_location import measure_answer, surround
from llavar_peft.datagen.synth.detailed_style import draw_detailed
from llavar_peft.datagen.synth.font_faces import list_faces
from llavar_peft.datagen.synth.plain_style import draw_plain
from llavar_peft.datagen.synth.scene import PlacedLine, Quad, Scene
from llavar_peft.datagen.synth.synth_record import make_synth_record
from llavar_peft.datagen.synth.synth_settings import Level, SynthKind, SynthSettings
from llavar_peft.datagen.synth.vocabulary import load_vocabulary


@dataclass(frozen=True, kw_only=True)
class DrawnPage:
    """An image and its truth.

    Attributes:
        image: RGB; where it was photographed, before its compression.
        kind: Of which kind.
        language: Of its words.
        lines: The text, in reading order.
        quads: Where each line's ink is in the image: four corners, clockwise from the top left, in pixels.
        questions: What may be asked, with the answers.
        quality: JPEG's; None for PNG.
    """

    image: Image.Image
    kind: SynthKind
    language: str
    lines: tuple[PlacedLine, ...]
    quads: tuple[Quad, ...]
    questions: tuple[tuple[str, str], ...]
    quality: int | None

    @property
    def transcript(self) -> str:
        """All text in reading order, a paragraph in each line."""
        blocks = groupby(self.lines, key=lambda line: line.block)
        return "\n".join(" ".join(line.text for line in block) for _, block in blocks)

    def encoded(self) -> tuple[str, bytes]:
        """The image's file: its extension and its bytes."""
        file = io.BytesIO()
        if self.quality is None:
            self.image.save(file, "PNG", compress_level=1)  # half the time, a sixth larger
            return ".png", file.getvalue()
        self.image.save(file, "JPEG", quality=self.quality)
        return ".jpg", file.getvalue()


def draw_page(settings: SynthSettings, index: int) -> DrawnPage:
    """Draw one image.

    Args:
        settings: What is drawn.
        index: Its number.

    Returns:
        The image with its truth.

    Raises:
        ConfigError: There are no words of a language.
        DataError: No font can write a language, or a font cannot be read.
    """
    kind = settings.turns[index % len(settings.turns)]
    language = settings.languages[index // len(settings.turns) % len(settings.languages)]
    rng, scene = _invent(settings, kind, language, index)
    image, quads, quality = _distorted(*scene.draw(), settings.distort, rng)
    return DrawnPage(
        image=image,
        kind=kind,
        language=language,
        lines=tuple(scene.lines),
        quads=tuple(quads),
        questions=tuple(scene.questions),
        quality=quality,
    )


def describe_page(
    page: DrawnPage, index: int, settings: SynthSettings
) -> tuple[str, bytes, dict[str, Any], dict[str, Any]]:
    """Turn an image into what is written of it.

    Args:
        page: The image.
        index: Its number.
        settings: It was drawn with.

    Returns:
        Its file's name and bytes, its record in the released format, and its truth. Beside what the format asks for,
        the record says kind and language, and where its first answer stands: ``eval diagnose`` tells by them.
    """
    suffix, data = page.encoded()
    name = f"{page.kind}_{index:06d}{suffix}"
    record = make_synth_record(page, name, settings.task, Random(f"record/{settings.seed}/{index}"))
    asked, answered = (turn["value"] for turn in record["conversations"][:2])
    record |= {
        "kind": page.kind,
        "language": page.language,
        "image_width": page.image.width,
        "image_height": page.image.height,
        **measure_answer(asked.replace(IMAGE_PLACEHOLDER, ""), answered, page.lines, page.quads),
    }
    lines = [
        {
            "text": line.text,
            "polygon": [[round(x, 2), round(y, 2)] for x, y in quad],
            "box": surround([quad]),
            "paragraph": line.block,
            "size": line.size,
            "font": Path(line.face).stem,
        }
        for line, quad in zip(page.lines, page.quads, strict=True)
    ]
    truth = {
        "id": record["id"],
        "image": name,
        "kind": page.kind,
        "language": page.language,
        "width": page.image.width,
        "height": page.image.height,
        "text": page.transcript,
        "lines": lines,
        "questions": [list(pair) for pair in page.questions],
    }
    return name, data, record, truth


def _invent(settings: SynthSettings, kind: SynthKind, language: str, index: int) -> tuple[Random, Scene]:
    """The image, not yet drawn, and the generator that it came from."""
    if settings.style == "plain":
        # Named as when there was one of each: another name would be another image.
        rng = Random(f"{kind.removesuffix('s')}/{settings.seed}/{index}")
        return rng, draw_plain(kind, rng, settings.pixels)
    rng = Random(f"{kind}/{language}/{settings.seed}/{index}")
    words = load_vocabulary(language)
    return rng, draw_detailed(kind, rng, settings.pixels, words, _faces(settings.fonts, words.alphabet))


def _distorted(
    page: Image.Image, quads: list[Quad], level: Level, rng: Random
) -> tuple[Image.Image, list[Quad], int | None]:
    """What a camera makes of a page and its lines, and the quality of the file."""
    if level == "none":
        return page, quads, None
    # Not above: it takes numpy, whose threads would keep `write` from forking.
    from llavar_peft.datagen.synth.camera_distortion import draw_camera, move_quads, photograph

    camera = draw_camera(level, rng, *page.size)
    return photograph(page, camera), move_quads(quads, page.size, camera), camera.quality


@lru_cache(maxsize=16)
def _faces(fonts: Path | None, alphabet: str) -> tuple[str, ...]:
    return list_faces(fonts, alphabet)
