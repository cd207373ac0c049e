"""The gallery: each image once, with what was asked, what is true, and what the model said at each look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from llavar_peft.page.inline_images import InlineImage, embed_image, image_key
from llavar_peft.page.probe_moments import ProbeMoment
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
    """What the model said at one look; ``parts`` are (text, whether it differs from the truth)."""

    label: str
    parts: Parts
    correct: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """One question on an image, with the answers at the main looks and those in between."""

    id: str
    question: str
    truth: str
    answers: tuple[ShownAnswer, ...]
    between: tuple[ShownAnswer, ...]


@dataclass(frozen=True, slots=True)
class GalleryCard:
    """One image and everything asked about it; ``missing`` says why there is no image."""

    image: InlineImage | None
    missing: str
    asked: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class Gallery:
    """The cards that are shown, out of ``total`` images that the probe read."""

    cards: tuple[GalleryCard, ...]
    total: int


@dataclass(slots=True)
class _Group:
    """Samples on one image: where it lies, and per record each look's answer in order."""

    moment: ProbeMoment
    sample: Sample
    seen: dict[_Key, list[tuple[ProbeMoment, Sample]]] = field(default_factory=dict)


def make_gallery(looks: Sequence[ProbeMoment], most: int = MOST_CARDS) -> Gallery:
    """Gathers the answers by image.

    Args:
        looks: All looks of the run, in order.
        most: How many cards at most; the images' size may allow fewer.

    Returns:
        The gallery, images in the order that the probe first read them.
    """
    groups = list(_groups(looks).values())
    cards: list[GalleryCard] = []
    spent = 0
    for group in groups[:most]:
        card = _card(group)
        spent += len(card.image.uri) if card.image else 0
        if spent > _IMAGE_BUDGET:
            break
        cards.append(card)
    return Gallery(tuple(cards), len(groups))


def _groups(looks: Sequence[ProbeMoment]) -> dict[str, _Group]:
    """Group samples by image; the same id with another question or truth is another record."""
    home: dict[_Key, tuple[str, ProbeMoment, Sample]] = {}
    answers = [(moment, sample) for moment in looks for sample in moment.look.samples]
    for moment, sample in answers:
        key = (sample.id, sample.question, sample.truth)
        if key not in home or (not home[key][0] and sample.image):
            home[key] = (image_key(moment.stage.folder, sample.image) if sample.image else "", moment, sample)
    groups: dict[str, _Group] = {}
    for moment, sample in answers:
        key = (sample.id, sample.question, sample.truth)
        image, where, first = home[key]
        group = groups.setdefault(image or f"record {key}", _Group(where, first))
        group.seen.setdefault(key, []).append((moment, sample))
    return groups


def _card(group: _Group) -> GalleryCard:
    moment, sample = group.moment, group.sample
    image = embed_image(moment.stage.folder, sample.image) if sample.image else None
    missing = "" if image else ("Picture not found" if sample.image else "No picture in this record")
    return GalleryCard(image, missing, tuple(_asked(seen) for seen in group.seen.values()))


def _asked(seen: Sequence[tuple[ProbeMoment, Sample]]) -> Asked:
    first = seen[0][1]
    main: list[tuple[ProbeMoment, Sample]] = []
    between: list[tuple[ProbeMoment, Sample]] = []
    for moment, sample in seen:
        same = bool(main) and main[-1][1].answer == sample.answer
        if moment.main or (moment.repeat and not same):
            main.append((moment, sample))
        elif not moment.repeat:
            between.append((moment, sample))
    stride = -(-len(between) // _MOST_BETWEEN) or 1
    return Asked(
        id=displayed_answers(first.id, 80),
        question=displayed_answers(first.question),
        truth=displayed_answers(first.truth),
        answers=tuple(_answer(moment, sample) for moment, sample in main),
        between=tuple(_answer(moment, sample) for moment, sample in between[::stride]),
    )


def _answer(moment: ProbeMoment, sample: Sample) -> ShownAnswer:
    return make_answer(moment.short, sample.answer, sample.truth, correct=sample.correct)


def make_answer(label: str, answer: str, truth: str, *, correct: bool) -> ShownAnswer:
    """Return an answer whose parts that differ from the truth are marked, where it is wrong and close to it."""
    return ShownAnswer(
        label, tuple(_compare(displayed_answers(answer), displayed_answers(truth), correct=correct)), correct
    )


def _compare(answer: str, truth: str, *, correct: bool) -> Iterator[tuple[str, bool]]:
    """Yield the answer in parts, those that differ from the truth marked; an empty marked part is an omission."""
    matcher = SequenceMatcher(None, truth, answer, autojunk=False)
    comparable = not correct and max(len(truth), len(answer)) <= _LONGEST_COMPARED
    if not comparable or not answer or matcher.ratio() < _ALIKE:
        yield answer, False
        return
    for kind, _, _, first, last in matcher.get_opcodes():
        yield answer[first:last], kind != "equal"


def displayed_answers(text: str, longest: int = _LONGEST_TEXT) -> str:
    """Return text fit for a page: cut where it is long, control characters made visible."""
    plain = text.strip()
    cut = f"{plain[:longest]} \N{HORIZONTAL ELLIPSIS} ({len(plain):,} characters)" if len(plain) > longest else plain
    return "".join(chr(0x2400 + ord(one)) if ord(one) < 32 and one not in "\n\t" else one for one in cut)
