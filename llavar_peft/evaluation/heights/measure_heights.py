"""Ask a model the same questions at several letter heights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavar_peft.evaluation.heights.height_plan import HeightPlan, HeightSettings, letter_height
from llavar_peft.evaluation.heights.height_results import HeightCurve, HeightPoint
from llavar_peft.evaluation.vqa.answer_questions import answer_questions
from llavar_peft.evaluation.vqa.scored_results import Setting, rate, score_answers
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion

if TYPE_CHECKING:
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.inference.chat import Chat


def measure_curve(
    name: str,
    chat: Chat,
    plan: HeightPlan,
    roots: ImageRoots,
    setting: Setting,
    settings: HeightSettings,
    journals: Path,
    progress: Callable[[int, int], None] | None = None,
) -> HeightCurve:
    """Ask a model all questions of a plan, and score its answers.

    Args:
        name: Name of the model in the chart.
        chat: The model.
        plan: What to ask at which height.
        roots: Where the images are.
        setting: How answers are generated, with the hash of the model.
        settings: What is measured.
        journals: How the paths of the journals of answers begin, of which each height has one.
        progress: Called with the number of answers done and in total.

    Raises:
        ConfigError: A journal has other settings or other questions.
        ImageError: An image is missing, broken, or outside its folder.
        DataError: A journal is damaged.
    """
    points: list[HeightPoint] = []
    done = 0
    for height, asked in plan.asked.items():

        def count(now: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + now, plan.total)

        log = journals.with_name(f"{journals.name}-{height:g}px.answers.jsonl")
        answered = answer_questions(chat, asked, roots, setting, log, count, plan.canvases[height])
        points.append(score_height(height, answered, settings))
        done += len(asked)
    return HeightCurve(name, setting, plan.side, tuple(points), plan.left_out)


def score_height(height: float, answered: Sequence[VqaQuestion], settings: HeightSettings) -> HeightPoint:
    """Score the answers at a height."""
    records = score_answers(answered, "", Setting(), [settings.protocol]).records
    value, low, high = rate(records, settings.protocol)
    images = len({record.drawn_with for record in records})
    enlarged = sum(height > (letter_height(one) or height) for one in answered)
    return HeightPoint(height, value, low, high, len(records), images, enlarged)
