"""The gallery: each picture once, with what was asked, what is true, and what the model said at each look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from llavar_peft.page.looks import Moment
from llavar_peft.page.pictures import Picture, embed_picture, picture_key
from llavar_peft.page.records import Sample

MOST_CARDS = 36
_PICTURE_BUDGET = 1_900_000
_LONGEST_TEXT = 600
_LONGEST_COMPARED = 300
_MOST_BETWEEN = 12
_ALIKE = 0.5

Parts = tuple[tuple[str, bool], ...]
_Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said at one look; ``parts`` are (text, whether it differs from the truth)."""

    label: str
    parts: Parts
    correct: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """One question on a picture, with the answers at the main looks and those in between."""

    id: str
    question: str
    truth: str
    answers: tuple[Answer, ...]
    between: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """One picture and everything asked about it; ``missing`` says why there is no picture."""

    picture: Picture | None
    missing: str
    asked: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class Gallery:
    """The cards that are shown, out of ``total`` pictures that the probe read."""

    cards: tuple[Card, ...]
    total: int


@dataclass(slots=True)
class _Group:
    """Samples on one picture: where it lies, and per record each look's answer in order."""

    moment: Moment
    sample: Sample
    seen: dict[_Key, list[tuple[Moment, Sample]]] = field(default_factory=dict)


def make_gallery(looks: Sequence[Moment], most: int = MOST_CARDS) -> Gallery:
    """Gathers the answers by picture.

    Args:
        looks: All looks of the run, in order.
        most: How many cards at most; the pictures' size may allow fewer.

    Returns:
        The gallery, pictures in the order that the probe first read them.
    """
    groups = list(_groups(looks).values())
    cards: list[Card] = []
    spent = 0
    for group in groups[:most]:
        card = _card(group)
        spent += len(card.picture.uri) if card.picture else 0
        if spent > _PICTURE_BUDGET:
            break
        cards.append(card)
    return Gallery(tuple(cards), len(groups))


def _groups(looks: Sequence[Moment]) -> dict[str, _Group]:
    """Groups samples by picture; the same id with another question or truth is another record."""
    home: dict[_Key, tuple[str, Moment, Sample]] = {}
    answers = [(moment, sample) for moment in looks for sample in moment.look.samples]
    for moment, sample in answers:
        key = (sample.id, sample.question, sample.truth)
        if key not in home or (not home[key][0] and sample.image):
            home[key] = (picture_key(moment.stage.folder, sample.image) if sample.image else "", moment, sample)
    groups: dict[str, _Group] = {}
    for moment, sample in answers:
        key = (sample.id, sample.question, sample.truth)
        picture, where, first = home[key]
        group = groups.setdefault(picture or f"record {key}", _Group(where, first))
        group.seen.setdefault(key, []).append((moment, sample))
    return groups


def _card(group: _Group) -> Card:
    moment, sample = group.moment, group.sample
    picture = embed_picture(moment.stage.folder, sample.image) if sample.image else None
    missing = "" if picture else ("Picture not found" if sample.image else "No picture in this record")
    return Card(picture, missing, tuple(_asked(seen) for seen in group.seen.values()))


def _asked(seen: Sequence[tuple[Moment, Sample]]) -> Asked:
    first = seen[0][1]
    main: list[tuple[Moment, Sample]] = []
    between: list[tuple[Moment, Sample]] = []
    for moment, sample in seen:
        same = bool(main) and main[-1][1].answer == sample.answer
        if moment.main or (moment.repeat and not same):
            main.append((moment, sample))
        elif not moment.repeat:
            between.append((moment, sample))
    stride = -(-len(between) // _MOST_BETWEEN) or 1
    return Asked(
        id=shown(first.id, 80),
        question=shown(first.question),
        truth=shown(first.truth),
        answers=tuple(_answer(moment, sample) for moment, sample in main),
        between=tuple(_answer(moment, sample) for moment, sample in between[::stride]),
    )


def _answer(moment: Moment, sample: Sample) -> Answer:
    return make_answer(moment.short, sample.answer, sample.truth, correct=sample.correct)


def make_answer(label: str, answer: str, truth: str, *, correct: bool) -> Answer:
    """Returns an answer whose parts that differ from the truth are marked, where it is wrong and close to it."""
    return Answer(label, tuple(_compare(shown(answer), shown(truth), correct=correct)), correct)


def _compare(answer: str, truth: str, *, correct: bool) -> Iterator[tuple[str, bool]]:
    """Yields the answer in parts, those that differ from the truth marked; an empty marked part is an omission."""
    matcher = SequenceMatcher(None, truth, answer, autojunk=False)
    comparable = not correct and max(len(truth), len(answer)) <= _LONGEST_COMPARED
    if not comparable or not answer or matcher.ratio() < _ALIKE:
        yield answer, False
        return
    for kind, _, _, first, last in matcher.get_opcodes():
        yield answer[first:last], kind != "equal"


def shown(text: str, longest: int = _LONGEST_TEXT) -> str:
    """Returns text fit for a page: cut where it is long, control characters made visible."""
    plain = text.strip()
    cut = f"{plain[:longest]} \N{HORIZONTAL ELLIPSIS} ({len(plain):,} characters)" if len(plain) > longest else plain
    return "".join(chr(0x2400 + ord(one)) if ord(one) < 32 and one not in "\n\t" else one for one in cut)
