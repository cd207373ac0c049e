"""Which questions are asked at which letter height, and how their images are shown there.

A height is that of the letters of the answer in the prepared image of the plain model: the square of the tower's side
(336 pixels in LLaVAR) to which an image is brought. For a model that sees more of an image than this, such as one with
tiles, it is the same number, so that the curves of all models have one axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from llavar_peft.data.image_preparation import image_settings, prepared_scale
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.letter_canvas import PADDING, LetterCanvas, check_heights, cropped_canvas, whole_canvas
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.evaluation.vqa.answer_metrics import LOWER_IS_BETTER, PROTOCOLS, Protocol
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.types import ImageMode

TooSmall: TypeAlias = Literal["omit", "fewer", "crop"]
HEIGHTS: Final = tuple(map(float, range(3, 20)))
"""The paper's. Source: arXiv 2306.17107, section 5.3."""

REASONS: Final[Mapping[str, str]] = {
    "no_image": "without an image",
    "yes_or_no": "answered by yes or no",
    "unreadable": "with an image that the OCR engine cannot read",
    "not_found": "whose answer is not found in the image",
    "too_small": "with letters that are lower than a height even where the image fills the view",
    "enlarged": "with letters that would be enlarged too much",
    "too_wide": "with an answer wider than the view",
}
"""Why questions are left out."""


@dataclass(frozen=True, kw_only=True)
class HeightSettings:
    """What is measured.

    Attributes:
        heights: Letter heights in pixels of the prepared image, in ascending order.
        side: Side in pixels of the prepared image that heights refer to; None for that of each model's tower.
        too_small: What to do about a question whose letters are lower than a height even where its image fills the
            view. ``omit``: leave it out at all heights, so that each height has the same questions; ``fewer``: leave it
            out at the heights that it cannot reach; ``crop``: show only the part of the image around its answer.
        most_enlarged: Factor by which letters may be enlarged from the pixels of the image file; questions whose
            letters need more are left out like those that are too small.
        protocol: The protocol that scores the answers.
    """

    heights: tuple[float, ...] = HEIGHTS
    side: int | None = None
    too_small: TooSmall = "omit"
    most_enlarged: float = 2.0
    protocol: Protocol = "multimodalocr"

    def __post_init__(self) -> None:
        """Check the values."""
        check_heights(self.heights, "heights")
        if list(self.heights) != sorted(set(self.heights)):
            raise ConfigError.at("heights", f"not in ascending order (got {self.heights})", "sort them")
        if self.side is not None and not 32 <= self.side <= 4096:
            raise ConfigError.at("--side", f"got {self.side}, expected 32 to 4096 pixels", "leave it out")
        if not 1 <= self.most_enlarged <= 100:
            what = f"got {self.most_enlarged:g}, expected a factor of 1 to 100"
            raise ConfigError.at("--most-enlarged", what, "use 2, the default")
        if self.too_small not in get_args(TooSmall):
            what = f"got {self.too_small!r}, expected {', '.join(get_args(TooSmall))}"
            raise ConfigError.at("--too-small", what, "choose one of these")
        shares = [name for name in PROTOCOLS if name not in LOWER_IS_BETTER]
        if self.protocol not in shares:
            what = f"got {self.protocol!r}, expected a protocol whose scores are shares"
            raise ConfigError.at("--metric", what, f"use one of {', '.join(shares)}")


@dataclass(frozen=True, slots=True)
class HeightPlan:
    """What a model is asked.

    Attributes:
        side: Side in pixels of the prepared image that heights refer to.
        asked: Questions by height.
        canvases: How the image of each question is shown, by height and id of the question.
        left_out: Number of questions that are asked at no height, by reason.
    """

    side: float
    asked: Mapping[float, tuple[VqaQuestion, ...]]
    canvases: Mapping[float, Mapping[str, LetterCanvas]]
    left_out: Mapping[str, int]

    @property
    def total(self) -> int:
        """Number of answers."""
        return sum(map(len, self.asked.values()))


def letter_height(question: VqaQuestion) -> float | None:
    """Return the height of an answer's letters in pixels of the image, by its record or its place."""
    return question.text_height or (question.box[3] - question.box[1] if question.box else None)


def plan_heights(
    questions: Sequence[VqaQuestion],
    roots: ImageRoots,
    settings: HeightSettings,
    mode: ImageMode,
    processor: Any,
    left_out: Mapping[str, int] | None = None,
) -> HeightPlan:
    """Decide which questions are asked at which height.

    Args:
        questions: Questions with the height or the box of their answer.
        roots: Folders of the images whose size the questions do not give.
        settings: What is measured.
        mode: How the model prepares images.
        processor: The model's processor.
        left_out: Number of questions that were left out before, by reason.

    Raises:
        DataError: No question can be asked at one of the heights.
        ImageError: An image cannot be opened.
    """
    side = float(settings.side or prepared_scale((1000, 1000), mode, processor) * 1000)
    padding = _padding(mode, processor)
    sizes: dict[str, tuple[int, int]] = {}
    shown: dict[float, dict[str, LetterCanvas]] = {height: {} for height in settings.heights}
    reasons = Counter(left_out or {})
    for question in questions:
        image = str(question.image)
        size = question.size or sizes.get(image) or roots.open(image).size
        sizes[image] = size
        found = {height: _show(question, size, height, side, settings, padding) for height in settings.heights}
        canvases = {height: canvas for height, canvas in found.items() if isinstance(canvas, LetterCanvas)}
        if not canvases or (len(canvases) < len(found) and settings.too_small != "fewer"):
            # The height that decides: the greatest, or the lowest if any height that is reached is enough.
            ordered = sorted(found.items(), reverse=settings.too_small != "fewer")
            reasons[next(why for _, why in ordered if isinstance(why, str))] += 1
            continue
        for height, canvas in canvases.items():
            shown[height][question.id] = canvas
    asked = {height: tuple(one for one in questions if one.id in shown[height]) for height in settings.heights}
    plan = HeightPlan(side, asked, shown, dict(reasons))
    _check_asked(plan, questions, sizes, settings)
    return plan


_Padding: TypeAlias = tuple[tuple[float, float], tuple[int, ...]]


def _padding(mode: ImageMode, processor: Any) -> _Padding:
    """Return where an image mode places an image that it pads, and the colour around it."""
    if mode == "pad_black":
        return (0.0, 0.0), (0, 0, 0)
    return (0.5, 0.5), PADDING if isinstance(processor, int) else image_settings(processor).colour


def _show(
    question: VqaQuestion,
    size: tuple[int, int],
    height: float,
    side: float,
    settings: HeightSettings,
    padding: _Padding,
) -> LetterCanvas | str:
    """Return how the image of a question is shown at a height, or why it cannot be."""
    letters = letter_height(question)
    if letters is None:
        return "not_found"
    if height > settings.most_enlarged * letters:
        return "enlarged"
    place, colour = padding
    whole = whole_canvas(size, letters, height, side, place=place, colour=colour)
    if whole is not None:
        return whole
    if settings.too_small != "crop" or question.box is None:
        return "too_small"
    return cropped_canvas(size, question.box, letters, height, side, colour=colour) or "too_wide"


def _check_asked(
    plan: HeightPlan,
    questions: Sequence[VqaQuestion],
    sizes: Mapping[str, tuple[int, int]],
    settings: HeightSettings,
) -> None:
    """Raise ``DataError`` if no question is left at a height; its fix names a height that half of them reach."""
    empty = [height for height, asked in plan.asked.items() if not asked]
    if not empty:
        return
    listed = "; ".join(f"{count} {REASONS[why]}" for why, count in plan.left_out.items()) or "there is none"
    what = f"no question can be asked at {empty[-1]:g} px (of the data set: {listed})"
    natural = sorted((letter_height(one) or 0.0) * plan.side / max(sizes[str(one.image)]) for one in questions)
    middle = int(natural[len(natural) // 2]) if natural else 0
    if not natural:
        fix = "check that the answers stand in the images, or give text_height or box in the records"
    else:
        fix = f"use heights of at most {middle}, which half of the questions reach" if middle else "use larger letters"
        fix += "" if settings.too_small == "crop" else ", or --too-small crop"
    raise DataError.at("--heights", what, fix)
