"""Results: each answer with its scores, and figures that say how they were taken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.answer_metrics import LOWER_IS_BETTER, PROTOCOLS, Protocol, Score, applies, score
from llavar_peft.evaluation.vqa.confidence_intervals import ratio_intervals, sum_by_name
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.types import ImageMode

_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """How answers were got; None is what a file of predictions does not say.

    Attributes:
        model: The folder that was asked, with the adapter's.
        model_hash: Of its weights; see ``identify_model``.
        prompt: What was asked, ``{question}`` standing for the question.
        image_mode: How images were prepared.
        temperature: 0 is greedy.
        top_k: Tokens that were sampled from at most, the likeliest ones; 0 for all.
        max_new_tokens: Tokens at most per answer.
        seed: Of the sampling.
        batch_size: Questions asked at once, on which sampled answers depend.
    """

    model: str | None = None
    model_hash: str | None = None
    prompt: str | None = None
    image_mode: ImageMode | None = None
    temperature: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, with all that it depends on.

    Attributes:
        protocol: How answers were scored.
        value: In percent.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end; images are drawn, with all questions on them.
        records: How many answers it is of.
        lower_is_better: Whether it counts errors.
        setting: How the answers were got.
    """

    protocol: str
    value: float
    low: float
    high: float
    records: int
    lower_is_better: bool
    setting: Setting

    def as_dict(self) -> dict[str, Any]:
        """Flat, ready for JSON."""
        plain = asdict(self)
        decoding = {None: None, 0.0: "greedy"}.get(self.setting.temperature, "sampled")
        return {
            **{key: value for key, value in plain.items() if key != "setting"},
            **plain["setting"],
            "decoding": decoding,
        }


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, its answer, and what that got.

    Attributes:
        id: The question's.
        question: Its words.
        answer: The model's.
        truths: The right answers.
        image: The image's path as the data set has it.
        fields: Kinds, as the data set has them.
        scores: By protocol.
        letter_height: Of the text that holds the answer, in pixels of what the tower sees.
        position: Of its middle in the image, (x, y) from 0 to 1.
    """

    id: str
    question: str
    answer: str
    truths: tuple[str, ...]
    image: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, Score] = field(default_factory=dict)
    letter_height: float | None = None
    position: tuple[float, float] | None = None

    @property
    def drawn_with(self) -> tuple[str, bool]:
        """Tell the records that a bootstrap draws together: those on one image."""
        return (self.id, False) if self.image is None else (self.image, True)


@dataclass(frozen=True, slots=True)
class Results:
    """What an evaluation found.

    Attributes:
        dataset: The file that was asked from.
        setting: How the answers were got.
        figures: One for each protocol.
        records: Each answer.
    """

    dataset: str
    setting: Setting
    figures: tuple[Figure, ...]
    records: tuple[Answered, ...]

    def as_dict(self, *, records: bool = True) -> dict[str, Any]:
        """The same, ready for JSON.

        Args:
            records: Whether single answers are in it.

        Returns:
            Plain data.
        """
        plain: dict[str, Any] = {
            "format": _FORMAT,
            "dataset": self.dataset,
            "setting": asdict(self.setting),
            "figures": [figure.as_dict() for figure in self.figures],
        }
        return {**plain, "records": [_plain(record) for record in self.records]} if records else plain


def score_answers(
    questions: Sequence[VqaQuestion],
    dataset: str,
    setting: Setting,
    protocols: Sequence[Protocol] = (),
    measures: Mapping[str, tuple[float | None, tuple[float, float] | None]] | None = None,
) -> Results:
    """Score answers.

    Args:
        questions: Each with its answer.
        dataset: What to call them.
        setting: How the answers were got.
        protocols: Which figures to take; none stands for all that the data allows.
        measures: Letters' height and place by question; see ``diagnostics.measure``.

    Returns:
        Scores and figures.

    Raises:
        DataError: A protocol needs truths that the data does not have.
    """
    chosen = list(protocols) or [name for name in PROTOCOLS if all(applies(name, one.truths) for one in questions)]
    records: list[Answered] = []
    for question in questions:
        height, position = (measures or {}).get(question.id, (None, None))
        answer = question.answer or ""
        scores: dict[str, Score] = {name: score(name, answer, question.truths) for name in chosen}
        records.append(
            Answered(
                question.id, question.question, answer, question.truths, question.image, question.fields, scores,
                height, position,
            )
        )  # fmt: skip
    return Results(dataset, setting, tuple(_figures(records, chosen, setting)), tuple(records))


def _figures(records: Sequence[Answered], protocols: Sequence[Protocol], setting: Setting) -> list[Figure]:
    return [Figure(name, *rate(records, name), len(records), name in LOWER_IS_BETTER, setting) for name in protocols]


def rate(records: Sequence[Answered], protocol: str) -> tuple[float, float, float]:
    """Take the figure of some records.

    Args:
        records: With scores by this protocol.
        protocol: Which.

    Returns:
        The figure in percent, and the ends of its 95 % interval; images are drawn, with all questions on them.
    """
    scores = np.array([[record.scores[protocol].points, record.scores[protocol].out_of] for record in records])
    by_image = sum_by_name(scores, [record.drawn_with for record in records])
    ((low, high),) = ratio_intervals(by_image[:, :1], by_image[:, 1:])
    points, out_of = scores.sum(axis=0)
    return 100 * float(points / max(out_of, 1e-12)), 100 * low, 100 * high


def write_results(results: Results, path: Path) -> None:
    """Write a results file, whole or not at all."""
    write_json(path, results.as_dict())


def read_results(path: str | Path) -> Results:
    """Read a results file.

    Args:
        path: As ``write_results`` wrote it.

    Returns:
        Its content.

    Raises:
        DataError: It is no such file.
    """
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
        if plain["format"] != _FORMAT:
            raise ValueError(f"format {plain['format']}, expected {_FORMAT}")
        setting = Setting(**plain["setting"])
        return Results(
            str(plain["dataset"]),
            setting,
            tuple(_figure(figure, setting) for figure in plain["figures"]),
            tuple(_answered(record) for record in plain["records"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError.at(
            str(path), f"is not readable as results ({error!r})", "give a file that 'llavar-peft eval vqa --out' wrote"
        ) from error


def _figure(plain: Mapping[str, Any], setting: Setting) -> Figure:
    own = [entry.name for entry in fields(Figure) if entry.name != "setting"]
    return Figure(**{name: plain[name] for name in own}, setting=setting)


def _plain(record: Answered) -> dict[str, Any]:
    scores = {name: [one.points, one.out_of] for name, one in record.scores.items()}
    plain = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    return {**plain, "truths": list(record.truths), "fields": dict(record.fields), "scores": scores}


def _answered(plain: Mapping[str, Any]) -> Answered:
    position = plain["position"]
    return Answered(
        **{
            **plain,
            "truths": tuple(plain["truths"]),
            "scores": {name: Score(*one) for name, one in plain["scores"].items()},
            "position": None if position is None else (position[0], position[1]),
        }
    )
