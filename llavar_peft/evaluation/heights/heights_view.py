"""The view of figures by letter height for a page of their own or a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL.Image import Resampling

from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.errors import count_of
from llavar_peft.evaluation.heights.height_plan import REASONS, HeightPlan
from llavar_peft.evaluation.heights.height_results import READABLE, HeightCurve, HeightResults, describe_crossing
from llavar_peft.page.charts import height_chart
from llavar_peft.page.findings import Finding, choose_findings, find_few_records
from llavar_peft.page.heights_page import HeightsView, ReadModel
from llavar_peft.page.image_gallery import displayed_answers
from llavar_peft.page.inline_images import InlineImage, embed_pixels

_SETTINGS: Final = ("model", "model_hash", "prompt", "image_mode", "temperature", "top_k", "max_new_tokens", "seed")
_MOST_CHARACTERS: Final = 80
_QUESTIONS: Final = {
    "omit": "Each height has the same questions.",
    "fewer": "Each height has the questions that reach it, so that their number differs.",
    "crop": "Where letters are lower in the whole image, the part of the image around the answer is shown.",
}


def view_heights(results: HeightResults) -> HeightsView:
    """Build the view of figures by height."""
    curves = results.curves
    points = [[(one.height, one.value, one.low, one.high) for one in curve.points] for curve in curves]
    chart = height_chart(
        list(zip([curve.name for curve in curves], points, strict=True)), "bands: 95 % confidence intervals"
    )
    return HeightsView(
        name=Path(results.dataset).stem,
        protocol=results.protocol,
        chart=chart,
        models=tuple(map(_read_model, curves)),
        rows=tuple(_rows(curves)),
        notes=tuple(describe_heights(results)),
        settings=tuple((curve.name, tuple(_facts(curve))) for curve in curves),
    )


def find_in_heights(results: HeightResults) -> tuple[Finding, ...]:
    """Return what figures by height say about the next step.

    Rules: at a model's lowest height, the whole interval is at or above the accuracy that counts as readable; or at its
    greatest height, the whole interval is below it; and of all figures, the one with the widest interval rests on too
    few questions, as in ``find_few_records``.
    """
    found: list[Finding | None] = []
    for curve in results.curves:
        lowest, greatest = curve.points[0], curve.points[-1]
        if lowest.low >= READABLE:
            text = (
                f"{curve.name} still reads letters of {lowest.height:g} px, the lowest that were asked: ask at lower "
            )
            found.append(Finding("range", f"{text}ones (--heights)."))
        elif greatest.high < READABLE:
            text = (
                f"{curve.name} answers {greatest.value:.0f} % at {greatest.height:g} px, the greatest height: ask at "
            )
            found.append(
                Finding("range", f"{text}greater ones (--heights) to see whether the letters' size limits it.")
            )
    widths = [(point.high - point.low, curve, point) for curve in results.curves for point in curve.points]
    _, curve, point = max(widths, key=lambda one: one[0])
    figure = f"{results.protocol} of {curve.name} at {point.height:g} px"
    return choose_findings([*found, find_few_records(figure, point.questions, point.low, point.high, "question")])


def show_seen(plan: HeightPlan, roots: ImageRoots) -> tuple[tuple[str, InlineImage], ...]:
    """Return what a plain model sees of one image at the lowest, the middle and the greatest height of a plan."""
    heights = sorted(plan.asked)
    question = plan.asked[heights[-1]][0]  # what is asked at the greatest height is asked at all
    image = roots.open(str(question.image))
    side = round(plan.side)
    seen = []
    for height in dict.fromkeys((heights[0], heights[len(heights) // 2], heights[-1])):
        shown = plan.canvases[height][question.id].show(image).resize((side, side), Resampling.BICUBIC)
        truth = displayed_answers(question.truths[0], _MOST_CHARACTERS)
        asked = displayed_answers(question.question, _MOST_CHARACTERS)
        seen.append((f"{height:g} px of {side}: {asked} {truth}", embed_pixels(shown)))
    return tuple(seen)


def describe_heights(results: HeightResults) -> list[str]:
    """Return in whole sentences what heights mean, what was asked, and what was left out."""
    sides = sorted({curve.side for curve in results.curves})
    prepared = f"the prepared image of {_list(sides)} pixels that a plain model sees"
    sentences = [
        f"Height: that of the letters of the answer, in pixels of {prepared}. It comes from {results.measured}.",
        f"{count_of(results.total, 'question')}. {_QUESTIONS.get(results.too_small, '')}",
    ]
    of_models = {curve.name: _describe_questions(curve) for curve in results.curves}
    if len(set(of_models.values())) == 1:
        return [*sentences, *of_models[results.curves[0].name]]
    return [*sentences, *(f"{name}: {sentence}" for name, described in of_models.items() for sentence in described)]


def _describe_questions(curve: HeightCurve) -> tuple[str, ...]:
    """Return in whole sentences which questions a model was not asked, and whose letters are not sharp."""
    sentences = []
    if curve.left_out:
        reasons = "; ".join(f"{count:,} {REASONS.get(why, why)}" for why, count in curve.left_out.items())
        sentences.append(f"{sum(curve.left_out.values()):,} left out: {reasons}.")
    greatest = max(curve.points, key=lambda point: point.enlarged)
    if greatest.enlarged:
        sentences.append(
            f"At {greatest.height:g} px, the letters of {count_of(greatest.enlarged, 'question')} are larger than in "
            "the image file, and less sharp than the height suggests."
        )
    return tuple(sentences)


def _list(sides: Sequence[float]) -> str:
    return " or ".join(f"{side:g} x {side:g}" for side in sides)


def question_count(curve: HeightCurve) -> str:
    """Return the number of questions at each height, or its range."""
    counts = [point.questions for point in curve.points]
    return f"{counts[0]:,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"


def _read_model(curve: HeightCurve) -> ReadModel:
    readable, half = (
        describe_crossing(crossing, curve.points).replace(" ", "\N{NO-BREAK SPACE}") for crossing in curve.crossings
    )
    return ReadModel(curve.name, question_count(curve), f"{curve.best:.1f}\N{NO-BREAK SPACE}%", readable, half)


def _rows(curves: Sequence[HeightCurve]) -> list[tuple[str, tuple[tuple[str, str, str], ...]]]:
    by_height = [{point.height: point for point in curve.points} for curve in curves]
    rows = []
    for height in sorted({height for points in by_height for height in points}):
        cells = []
        for curve, points in zip(curves, by_height, strict=True):
            point = points.get(height)
            value = "" if point is None else f"{point.value:.1f}"
            note = "" if point is None else f"{point.low:.1f} to {point.high:.1f}, of {point.questions:,}"
            cells.append((curve.name, value, note))
        rows.append((f"{height:g} px", tuple(cells)))
    return rows


def _facts(curve: HeightCurve) -> list[tuple[str, str]]:
    values = {name: getattr(curve.setting, name) for name in _SETTINGS}
    return [(name.replace("_", " "), str(value)) for name, value in values.items() if value is not None]
