"""Synthetic text-rich pictures with questions: what the quickstart trains on and the tests hold the whole recipe to.

A picture is a pure function of `(kind, seed, index)`: nothing is drawn from a global generator, so pictures may be made
in any order, by any number of processes, and are the same with the same version of Pillow.
"""

import json
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol, TypeAlias

from PIL import Image, ImageDraw

from llavar_peft.data.fonts import load_font
from llavar_peft.data.layouts import KINDS, Layout, TextLine, draw_layout

OCR_INSTRUCTIONS: tuple[str, ...] = (
    "Identify any text visible in the image provided.",
    "List all the text you can see in the given image.",
    "Enumerate the words or sentences visible in the picture.",
    "Describe any readable text present in the image.",
    "Report any discernible text you see in the image.",
    "Share any legible words or sentences visible in the picture.",
    "Provide a list of texts observed in the provided image.",
    "Note down any readable words or phrases shown in the photo.",
    "Report on any text that can be clearly read in the image.",
    "Mention any discernable and legible text present in the given picture.",
)
"""The ten questions of the noisy OCR data. Source: arXiv 2306.17107, appendix; the spelling is the original's."""

Colour: TypeAlias = tuple[int, int, int]
Task: TypeAlias = Literal["transcribe", "question", "conversation"]

LARGEST = 1.8
"""Greatest size of letters, as a multiple of the smallest: what a tower that sees 3 x 3 patches at once can tell."""

_LEAST_CONTRAST = 110


@dataclass(frozen=True, kw_only=True)
class SyntheticPicture:
    """A drawn picture and everything that is known about it.

    Attributes:
        image: RGB.
        kind: One of `KINDS`.
        lines: The text with its places, in reading order.
        questions: Pairs of a question and its only right answer.
    """

    image: Image.Image
    kind: str
    lines: tuple[TextLine, ...]
    questions: tuple[tuple[str, str], ...]

    @property
    def transcript(self) -> str:
        """All text in reading order, lines joined by a space."""
        return " ".join(line.text for line in self.lines)


def _luma(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _colour(rng: Random) -> Colour:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def draw_colours(rng: Random) -> tuple[Colour, Colour]:
    """Choose a background and an ink that can be told apart.

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


def render(layout: Layout, rng: Random) -> Image.Image:
    """Draw a layout.

    Args:
        layout: What stands where.
        rng: Where colours and ornaments come from.

    Returns:
        An RGB picture of the layout's size.
    """
    background, ink = draw_colours(rng)
    image = Image.new("RGB", (layout.width, layout.height), background)
    canvas = ImageDraw.Draw(image)
    if rng.random() < 0.3:
        thickness = max(1, round(max(image.size) * 0.008))
        canvas.rectangle((0, 0, layout.width - 1, layout.height - 1), outline=ink, width=thickness)
    for line in layout.lines:
        canvas.text((line.left, line.baseline), line.text, ink, load_font(line.font, line.size), anchor="ls")
    return image


def draw_picture(kind: str, seed: int, index: int, *, shortest: int = 192, longest: int = 448) -> SyntheticPicture:
    """Draw the picture that belongs to a seed and an index.

    Args:
        kind: One of `KINDS`: `sign`, `cover`, `poster` or `receipt`.
        seed: The data set's seed.
        index: The picture's number in it.
        shortest: Least length of the longer side in pixels.
        longest: Greatest length of the longer side in pixels.

    Returns:
        The picture; the same for the same arguments.

    Raises:
        ValueError: If `kind` is not one of `KINDS`.
    """
    rng = Random(f"{kind}/{seed}/{index}")
    layout = draw_layout(kind, rng, shortest=shortest, longest=longest, largest=LARGEST)
    return SyntheticPicture(image=render(layout, rng), kind=kind, lines=layout.lines, questions=layout.questions)


class Pictured(Protocol):
    """What a record needs to know of a picture."""

    @property
    def transcript(self) -> str:
        """All text."""
        ...

    @property
    def questions(self) -> tuple[tuple[str, str], ...]:
        """Pairs of a question and its only right answer."""
        ...


def make_record(picture: Pictured, name: str, task: Task, rng: Random) -> dict[str, Any]:
    """Write a picture's conversation in LLaVA's record format.

    Args:
        picture: What is asked about.
        name: The picture's file name, as the record gives it.
        task: `transcribe`: all text, on one of `OCR_INSTRUCTIONS` (stage 1). `question`: one of the picture's
            questions. `conversation`: all of them, in a random order, as turns of one conversation (stage 2).
        rng: Where the choices come from, among them whether the picture stands before or after the first question.

    Returns:
        `{"id", "image", "conversations"}`.

    Raises:
        ValueError: If `task` is none of the three.
    """
    if task == "transcribe":
        pairs = [(rng.choice(OCR_INSTRUCTIONS), picture.transcript)]
    elif task in {"question", "conversation"}:
        pairs = rng.sample(picture.questions, 1 if task == "question" else len(picture.questions))
    else:
        raise ValueError(f"no such task: {task!r}; there are: transcribe, question, conversation")
    first = rng.choice(("<image>\n{}", "{}\n<image>")).format(pairs[0][0])
    turns = list[dict[str, str]]()
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if number else first})
        turns.append({"from": "gpt", "value": answer})
    return {"id": Path(name).stem, "image": name, "conversations": turns}


def write_dataset(
    directory: str | Path,
    *,
    count: int,
    seed: int,
    task: Task,
    kinds: Sequence[str] = KINDS,
    longest: int = 448,
    processes: int = 1,
) -> Path:
    """Draw pictures and write them with their records.

    Args:
        directory: Gets `images/*.png` and `records.json`; made where it is missing.
        count: How many pictures; the kinds take turns.
        seed: Another seed gives other pictures and other strings.
        task: What is asked; see `make_record`.
        kinds: Some of `KINDS`.
        longest: Greatest length of the longer side in pixels; smaller pictures are faster to read back.
        processes: How many share the work, more than one on Linux alone; the result is the same.

    Returns:
        The path of `records.json`.

    Raises:
        ValueError: If a kind or the task does not exist.
    """
    root = Path(directory)
    (root / "images").mkdir(parents=True, exist_ok=True)
    draw = partial(_draw_one, root=root, seed=seed, task=task, kinds=tuple(kinds), longest=longest)
    # Spawned processes would run the caller's script once more; forked ones have nothing to do with its threads here.
    if processes == 1 or sys.platform != "linux":
        records = [draw(index) for index in range(count)]
    else:
        with ProcessPoolExecutor(
            processes,
            mp_context=get_context("fork"),
            initializer=signal.signal,  # Ctrl-C is for the parent to answer
            initargs=(signal.SIGINT, signal.SIG_IGN),
        ) as pool:
            records = list(pool.map(draw, range(count), chunksize=50))
    path = root / "records.json"
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return path


def _draw_one(index: int, *, root: Path, seed: int, task: Task, kinds: Sequence[str], longest: int) -> dict[str, Any]:
    kind = kinds[index % len(kinds)]
    picture = draw_picture(kind, seed, index, longest=longest)
    name = f"{kind}_{index:05d}.png"
    picture.image.save(root / "images" / name, compress_level=1)
    return make_record(picture, name, task, Random(f"record/{seed}/{index}"))
