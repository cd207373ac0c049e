"""The gallery of a page: each image with its questions, the true answers, and the model's answers in each probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from llavar_peft.page.inline_images import InlineImage, embed_image, image_key
from llavar_peft.page.named_probes import NamedProbe
from llavar_peft.page.run_log import Sample

MOST_CARDS = 36
_IMAGE_BUDGET = 1_900_000
_LONGEST_TEXT = 600
_LONGEST_COMPARED = 300
_MOST_BETWEEN = 12
_ALIKE = 0.5

Parts = tuple[tuple[str, bool], ...]
_Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """The model's answer in one probe; ``parts`` are (text, whether it differs from the truth)."""

    label: str
    parts: Parts
    correct: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about an image, with the answers in the main probes and in the probes between them."""

    id: str
    question: str
    truth: str
    answers: tuple[ShownAnswer, ...]
    between: tuple[ShownAnswer, ...]


@dataclass(frozen=True, slots=True)
class GalleryCard:
    """An image with its questions; ``missing`` is the reason why there is no image."""

    image: InlineImage | None
    missing: str
    asked: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class Gallery:
    """The cards on the page, out of ``total`` images that were probed."""

    cards: tuple[GalleryCard, ...]
    total: int


@dataclass(slots=True)
class _Group:
    """The answers about one image by record, and the probe and sample in which the image is found."""

    named: NamedProbe
    sample: Sample
    answers: dict[_Key, list[tuple[NamedProbe, Sample]]] = field(default_factory=dict)


def make_gallery(probes: Sequence[NamedProbe], most: int = MOST_CARDS) -> Gallery:
    """Group the answers of a run by image, in the order in which the images were first probed.

    Args:
        probes: All probes of the run, in order.
        most: Maximum number of cards; the size of the images may allow fewer.
    """
    groups = list(_groups(probes).values())
    cards: list[GalleryCard] = []
    total_size = 0
    for group in groups[:most]:
        card = _card(group)
        total_size += len(card.image.uri) if card.image else 0
        if total_size > _IMAGE_BUDGET:
            break
        cards.append(card)
    return Gallery(tuple(cards), len(groups))


def _groups(probes: Sequence[NamedProbe]) -> dict[str, _Group]:
    """Group samples by image. The same id with another question or truth is another record."""
    first: dict[_Key, tuple[str, NamedProbe, Sample]] = {}
    answers = [(named, sample) for named in probes for sample in named.probe.samples]
    for named, sample in answers:
        key = (sample.id, sample.question, sample.truth)
        if key not in first or (not first[key][0] and sample.image):
            first[key] = (image_key(named.stage.folder, sample.image) if sample.image else "", named, sample)
    groups: dict[str, _Group] = {}
    for named, sample in answers:
        key = (sample.id, sample.question, sample.truth)
        image, first_probe, first_sample = first[key]
        group = groups.setdefault(image or f"record {key}", _Group(first_probe, first_sample))
        group.answers.setdefault(key, []).append((named, sample))
    return groups


def _card(group: _Group) -> GalleryCard:
    path = group.sample.image
    image = embed_image(group.named.stage.folder, path) if path else None
    missing = "" if image else ("Image not found" if path else "No image in this record")
    return GalleryCard(image, missing, tuple(_asked(answers) for answers in group.answers.values()))


def _asked(answers: Sequence[tuple[NamedProbe, Sample]]) -> Asked:
    first = answers[0][1]
    main: list[tuple[NamedProbe, Sample]] = []
    between: list[tuple[NamedProbe, Sample]] = []
    for named, sample in answers:
        same = bool(main) and main[-1][1].answer == sample.answer
        if named.main or (named.repeat and not same):
            main.append((named, sample))
        elif not named.repeat:
            between.append((named, sample))
    stride = -(-len(between) // _MOST_BETWEEN) or 1
    return Asked(
        id=displayed_answers(first.id, 80),
        question=displayed_answers(first.question),
        truth=displayed_answers(first.truth),
        answers=tuple(_answer(named, sample) for named, sample in main),
        between=tuple(_answer(named, sample) for named, sample in between[::stride]),
    )


def _answer(named: NamedProbe, sample: Sample) -> ShownAnswer:
    return make_answer(named.label, sample.answer, sample.truth, correct=sample.correct)


def make_answer(label: str, answer: str, truth: str, *, correct: bool) -> ShownAnswer:
    """Return an answer; if it is wrong but close to the truth, the parts that differ are marked."""
    return ShownAnswer(
        label, tuple(_compare(displayed_answers(answer), displayed_answers(truth), correct=correct)), correct
    )


def _compare(answer: str, truth: str, *, correct: bool) -> Iterator[tuple[str, bool]]:
    """Yield the parts of an answer, with those that differ marked; an empty marked part stands for missing text."""
    matcher = SequenceMatcher(None, truth, answer, autojunk=False)
    comparable = not correct and max(len(truth), len(answer)) <= _LONGEST_COMPARED
    if not comparable or not answer or matcher.ratio() < _ALIKE:
        yield answer, False
        return
    for kind, _, _, first, last in matcher.get_opcodes():
        yield answer[first:last], kind != "equal"


def displayed_answers(text: str, longest: int = _LONGEST_TEXT) -> str:
    """Return text for a page: long text is truncated, and control characters are made visible."""
    plain = text.strip()
    cut = f"{plain[:longest]} \N{HORIZONTAL ELLIPSIS} ({len(plain):,} characters)" if len(plain) > longest else plain
    return "".join(chr(0x2400 + ord(one)) if ord(one) < 32 and one not in "\n\t" else one for one in cut)
