"""Results of an evaluation: each answer with its scores, and figures with the setting they depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import DAMAGED, DataError, describe_reason
from llavar_peft.evaluation.vqa.answer_metrics import LOWER_IS_BETTER, PROTOCOLS, Protocol, Score, applies
from llavar_peft.evaluation.vqa.benchmark_protocols import BenchmarkProtocol, is_multiple_choice, score_column
from llavar_peft.evaluation.vqa.confidence_intervals import ratio_intervals, sum_by_name
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.text_files import read_json
from llavar_peft.types import ImageMode, ReadableRepr, expand_home

_FORMAT: Final = 1
_FIX: Final = "give a file written by 'llavar-peft eval vqa --out'"


@dataclass(frozen=True, slots=True, repr=False)
class Setting(ReadableRepr):
    """How answers were generated; None where it is unknown.

    Attributes:
        model: Folder of the model, and of the adapter.
        model_hash: Hash of the weights; see ``identify_model``.
        prompt: The prompt, with ``{question}`` in place of the question.
        image_mode: How images were prepared.
        temperature: 0 is greedy.
        top_k: Number of most likely tokens to sample from; 0 for all.
        max_new_tokens: Maximum number of tokens per answer.
        seed: Seed of sampled answers.
        batch_size: Number of questions per batch.
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


@dataclass(frozen=True, slots=True, repr=False)
class Figure(ReadableRepr):
    """One number with all that it depends on.

    Attributes:
        protocol: The protocol that answers were scored by.
        value: In percent.
        low: Lower end of the 95 % interval, Wilson's for proportions and the bootstrap's for other figures.
        high: Upper end. Both count images, with all questions on them.
        records: Number of answers.
        lower_is_better: Whether the protocol counts errors.
        setting: How the answers were generated.
    """

    protocol: str
    value: float
    low: float
    high: float
    records: int
    lower_is_better: bool
    setting: Setting

    def as_dict(self) -> dict[str, Any]:
        """Return all values as one flat mapping for JSON."""
        plain = asdict(self)
        decoding = {None: None, 0.0: "greedy"}.get(self.setting.temperature, "sampled")
        return {
            **{key: value for key, value in plain.items() if key != "setting"},
            **plain["setting"],
            "decoding": decoding,
        }


@dataclass(frozen=True, slots=True, repr=False)
class Answered(ReadableRepr):
    """A question with its answer and scores.

    Attributes:
        id: Id of the question.
        question: Text of the question.
        answer: The model's answer.
        truths: The correct answers.
        image: The image's path as given in the data set.
        fields: Values to group by, as given in the data set.
        scores: Score by protocol.
        letter_height: Height of the text that holds the answer, in pixels of the tower's input.
        position: Centre of that text in the image, (x, y) from 0 to 1.
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
        """Key of the records that the bootstrap draws together: those on one image."""
        return (self.id, False) if self.image is None else (self.image, True)


@dataclass(frozen=True, slots=True, repr=False)
class Results(ReadableRepr):
    """The results of an evaluation.

    Attributes:
        dataset: File or name of the data set.
        setting: How the answers were generated.
        figures: One figure per protocol.
        records: All answers.
        resolution: Line of a recipe with the cheapest resolution that reads letters that are too small, if some are.
    """

    dataset: str
    setting: Setting
    figures: tuple[Figure, ...]
    records: tuple[Answered, ...]
    resolution: str | None = None

    def as_dict(self, *, records: bool = True) -> dict[str, Any]:
        """Return the results as plain data for JSON.

        Args:
            records: Whether to include single answers.
        """
        plain: dict[str, Any] = {
            "format": _FORMAT,
            "dataset": self.dataset,
            "setting": asdict(self.setting),
            "figures": [figure.as_dict() for figure in self.figures],
            **({"resolution": self.resolution} if self.resolution else {}),
        }
        return {**plain, "records": [_plain(record) for record in self.records]} if records else plain


def score_answers(
    questions: Sequence[VqaQuestion],
    dataset: str,
    setting: Setting,
    protocols: Sequence[Protocol | BenchmarkProtocol] = (),
    measures: Mapping[str, tuple[float | None, tuple[float, float] | None]] | None = None,
) -> Results:
    """Score answers.

    Args:
        questions: Questions with their answers.
        dataset: Name of the data set.
        setting: How the answers were generated.
        protocols: Protocols to score by; none means all general ones that the data allows, or ``scienceqa`` where all
            questions list options.
        measures: Letter height and position by question id; see ``measure_letter_height``.

    Raises:
        DataError: A protocol needs truths that the data does not have.
        MissingDependencyError: A protocol needs a package that is not installed.
    """
    truths, answers = [one.truths for one in questions], [one.answer or "" for one in questions]
    chosen = list(protocols) or _fitting([one.question for one in questions], truths)
    columns = {name: score_column(name, answers, truths) for name in chosen}
    records: list[Answered] = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        height, position = (measures or {}).get(question.id, (None, None))
        scores: dict[str, Score] = {name: column[number] for name, column in columns.items()}
        records.append(
            Answered(
                question.id, question.question, answer, question.truths, question.image, question.fields, scores,
                height, position,
            )
        )  # fmt: skip
    return Results(dataset, setting, tuple(_figures(records, chosen, setting)), tuple(records))


def _fitting(questions: Sequence[str], truths: Sequence[Sequence[str]]) -> list[Protocol | BenchmarkProtocol]:
    """Return the protocols that are computed unless others are chosen."""
    # For letters of options, protocols that look for words mean nothing: normalization drops an "A".
    if is_multiple_choice(questions, truths):
        return ["scienceqa"]
    return [name for name in PROTOCOLS if all(applies(name, one) for one in truths)]


def _figures(records: Sequence[Answered], protocols: Sequence[str], setting: Setting) -> list[Figure]:
    return [
        Figure(
            name,
            *rate(records, name),
            sum(record.scores[name].out_of > 0 for record in records),
            name in LOWER_IS_BETTER,
            setting,
        )
        for name in protocols
    ]


def rate(records: Sequence[Answered], protocol: str) -> tuple[float, float, float]:
    """Return the figure of some records in percent, and the ends of its 95 % interval."""
    scores = np.array([[record.scores[protocol].points, record.scores[protocol].out_of] for record in records])
    by_image = sum_by_name(scores, [record.drawn_with for record in records])
    counts = protocol not in LOWER_IS_BETTER
    ((low, high),) = ratio_intervals(by_image[:, :1], by_image[:, 1:], counts=counts)
    points, out_of = scores.sum(axis=0)
    return 100 * float(points / (out_of or 1.0)), 100 * low, 100 * high


def write_results(results: Results, path: Path) -> None:
    """Write a results file atomically."""
    write_json(path, results.as_dict())


def read_results(path: str | Path) -> Results:
    """Read a results file that ``write_results`` wrote.

    Raises:
        DataError: It is not a results file, or contains no answers.
    """
    path = expand_home(path)
    if path.is_dir():
        inside = ", ".join(str(found) for found in sorted(path.glob("*.results.json"))[:3])
        raise DataError.at(str(path), "is a folder, expected a results file", f"give {inside}" if inside else _FIX)
    plain = read_json(path, fix=_FIX, lenient=True)
    try:
        if plain["format"] != _FORMAT:
            raise ValueError(f"format {plain['format']}, expected {_FORMAT}")
        setting = msgspec.convert(plain["setting"], Setting)
        results = Results(
            str(plain["dataset"]),
            setting,
            tuple(_read_figure(figure, setting) for figure in plain["figures"]),
            tuple(_read_answered(record) for record in plain["records"]),
            msgspec.convert(plain.get("resolution"), str | None),
        )
    except DAMAGED as error:
        raise DataError.at(str(path), f"cannot be read as results ({describe_reason(error)})", _FIX) from error
    if not results.records or not all(record.scores for record in results.records):
        raise DataError.at(str(path), "contains no scored answers", _FIX)
    return results


class _StoredFigure(msgspec.Struct):
    """The values of a figure in a file."""

    protocol: str
    value: float
    low: float
    high: float
    records: int
    lower_is_better: bool


class _StoredAnswer(msgspec.Struct):
    """The values of an answer in a file."""

    id: str
    question: str
    answer: str
    truths: list[str]
    image: str | None
    fields: dict[str, str]
    scores: dict[str, tuple[float, float]]
    letter_height: float | None
    position: tuple[float, float] | None


def _read_figure(plain: Any, setting: Setting) -> Figure:
    return Figure(**msgspec.structs.asdict(msgspec.convert(plain, _StoredFigure)), setting=setting)


def _plain(record: Answered) -> dict[str, Any]:
    scores = {name: [one.points, one.out_of] for name, one in record.scores.items()}
    plain = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    return {**plain, "truths": list(record.truths), "fields": dict(record.fields), "scores": scores}


def _read_answered(plain: Any) -> Answered:
    stored = msgspec.structs.asdict(msgspec.convert(plain, _StoredAnswer))
    scores = {name: Score(*one) for name, one in stored["scores"].items()}
    return Answered(**{**stored, "truths": tuple(stored["truths"]), "scores": scores})
