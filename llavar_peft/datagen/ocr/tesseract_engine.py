"""Tesseract, a program of the system, as an OCR engine."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Final

from llavar_peft.datagen.ocr.ocr_lines import EngineName, OcrError, OcrLine, Polygon, letter_count, scale_line
from llavar_peft.errors import EnvironmentFaultError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

SECONDS_PER_IMAGE: Final = 120
"""Time limit of Tesseract; a page of a book takes it about 5 seconds."""


class Tesseract:
    """The program ``tesseract``, called once for each image.

    Args:
        languages: For example ``"eng+deu"``.

    Raises:
        MissingDependencyError: The program or a language is not installed.
    """

    name: EngineName = "tesseract"

    def __init__(self, languages: str = "eng") -> None:
        program = shutil.which("tesseract")
        if program is None:
            raise MissingDependencyError.at(
                "tesseract", "the program is not installed", "install it (Debian: apt-get install tesseract-ocr)"
            )
        self._program = program
        self._languages = languages
        installed = set(self._run(["--list-langs"]).decode().split())
        missing = [language for language in languages.split("+") if language not in installed]
        if missing:
            raise MissingDependencyError.at(
                "tesseract",
                f"cannot read {', '.join(missing)}",
                f"install its data (Debian: tesseract-ocr-{missing[0]}); --list-langs shows what is installed",
            )

    @cached_property
    def version(self) -> str:
        """Version of the program, and the languages."""
        return f"{self._run(['--version']).decode().split()[1]} {self._languages}"

    def find(self, image: Image) -> tuple[Polygon, ...]:
        """Return where the image's lines are, read in an image twice as large. Raises ``OcrError``."""
        larger = image.resize((image.width * 2, image.height * 2))
        return tuple(scale_line(line, 0.5).polygon for line in self.read(larger))

    def read(self, image: Image) -> tuple[OcrLine, ...]:
        """Return the image's lines. Raises ``OcrError``."""
        file = io.BytesIO()
        image.save(file, "PPM")
        table = self._run(["stdin", "stdout", "-l", self._languages, "--psm", "3", "tsv"], file.getvalue()).decode()
        rows = csv.DictReader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE)
        words = [row for row in rows if row["level"] == "5" and (row["text"] or "").strip()]
        return tuple(_join_words(list(group)) for _, group in groupby(words, _line_key))

    def _run(self, arguments: list[str], stdin: bytes = b"") -> bytes:
        try:
            done = subprocess.run(
                [self._program, *arguments],
                input=stdin,
                capture_output=True,
                check=True,
                timeout=SECONDS_PER_IMAGE,
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},
            )
        except subprocess.CalledProcessError as error:
            message = error.stderr.decode(errors="replace").strip()[-200:]
            raise OcrError.at("tesseract", f"failed ({message})", "leave the image out") from error
        except subprocess.TimeoutExpired as error:
            raise OcrError.at(
                "tesseract", f"took more than {SECONDS_PER_IMAGE} s", "leave the image out, or scale it down"
            ) from error
        except OSError as error:
            raise EnvironmentFaultError.at(self._program, f"cannot be started ({error})", "install it again") from error
        return done.stdout


def _line_key(word: Mapping[str, str]) -> tuple[str, ...]:
    return word["block_num"], word["par_num"], word["line_num"]


def _join_words(words: Iterable[Mapping[str, str]]) -> OcrLine:
    """Join words into a line, with the box around them and the mean confidence of their letters."""
    words = list(words)
    weights = [max(1, letter_count(word["text"])) for word in words]
    confidence = sum(max(0.0, float(word["conf"])) * weight for word, weight in zip(words, weights, strict=True))
    boxes = [tuple(float(word[key]) for key in ("left", "top", "width", "height")) for word in words]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return OcrLine(" ".join(word["text"].strip() for word in words), corners, confidence / sum(weights) / 100)
