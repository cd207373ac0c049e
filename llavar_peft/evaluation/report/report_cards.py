"""The images of a report: the best and the worst, and those whose answers changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from llavar_peft.evaluation.vqa.answer_metrics import LOWER_IS_BETTER
from llavar_peft.evaluation.vqa.compare_results import Comparison
from llavar_peft.evaluation.vqa.scored_results import Answered, Results
from llavar_peft.page.image_gallery import Asked, GalleryCard, displayed_answers, make_answer
from llavar_peft.page.inline_images import InlineImage, embed_image
from llavar_peft.page.report_page import Cards, ScoredCard

_NO_SIZE = 1e9
_LONGEST = 280  # letters of a truth or an answer


class Images:
    """Images for a page, each opened once.

    Args:
        folders: Where they are looked for, in this order; no path may lead out of them.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(folders)
        self._known: dict[str, InlineImage | None] = {}

    def find(self, image: str) -> InlineImage | None:
        """Return an image ready to show; None where it is missing or broken."""
        if image not in self._known:
            tried = (embed_image(folder, image) for folder in self.folders)
            self._known[image] = next((opened for opened in tried if opened is not None), None)
        return self._known[image]


def extreme_cards(
    chain: Sequence[tuple[str, Results]], protocol: str, images: Images, most: int
) -> tuple[Cards, Cards]:
    """Choose the best and the worst answers, one on each image.

    Args:
        chain: Results on the same questions with their labels, in order; the last is judged.
        protocol: By which score.
        images: Where they are.
        most: How many of each.

    Returns:
        The best ones, of which those with the smallest letters come first, and the worst, the largest letters first.
    """
    records = chain[-1][1].records
    sign = 1 if protocol in LOWER_IS_BETTER else -1

    def height(record: Answered, unknown: float) -> float:
        return unknown if record.letter_height is None else record.letter_height

    def best(record: Answered) -> tuple[float, float]:
        return sign * record.scores[protocol].value, height(record, _NO_SIZE)

    def worst(record: Answered) -> tuple[float, float]:
        return -sign * record.scores[protocol].value, -height(record, 0.0)

    def row(title: str, aside: str, chosen: Sequence[Answered]) -> Cards:
        return Cards(title, aside, len(records), tuple(_card(one, chain, protocol, images) for one in chosen))

    most = min(most, (len(records) + 1) // 2)  # of a few, not all are the best
    first = _one_on_each(sorted(records, key=best), most)
    # No answer is shown as one of the best and of the worst.
    kept = {record.id for record in first}
    last = _one_on_each([one for one in sorted(records, key=worst) if one.id not in kept], most)
    return (
        row("Best", "By score; of those that score the same, the smallest letters first. One for each picture.", first),
        row("Worst", "By score; of those that score the same, the largest letters first. One for each picture.", last),
    )


def changed_cards(
    chain: Sequence[tuple[str, Results]], protocol: str, comparison: Comparison, images: Images, most: int
) -> list[Cards]:
    """Show answers that became better, and those that became worse, evenly spread over the data set.

    Args:
        chain: Results on the same questions with their labels, in order.
        protocol: Which score changed.
        comparison: Of the last two.
        images: Where they are.
        most: How many of each.

    Returns:
        Both rows, either of which may be empty.
    """
    records = {record.id: record for record in chain[-1][1].records}
    rows = []
    for title, gained in (("Became better", True), ("Became worse", False)):
        changed = [records[change.id] for change in comparison.changes if change.gained == gained]
        chosen = _spread(changed, most)
        cards = tuple(_card(one, chain, protocol, images) for one in chosen)
        aside = f"From {chain[-2][0]!r} to {chain[-1][0]!r}; evenly spread over the data set, none picked."
        rows.append(Cards(title, aside, len(changed), cards, near=True))
    return rows


def _one_on_each(records: Iterable[Answered], most: int) -> list[Answered]:
    """The first on each image, as far as there are enough."""
    found: dict[tuple[str, bool], Answered] = {}
    for record in records:
        if len(found) == most:
            break
        found.setdefault(record.drawn_with, record)
    return list(found.values())


def _spread(records: Sequence[Answered], most: int) -> list[Answered]:
    count = min(most, len(records))
    return [records[number * len(records) // count] for number in range(count)]


def _card(record: Answered, chain: Sequence[tuple[str, Results]], protocol: str, images: Images) -> ScoredCard:
    image = images.find(record.image) if record.image else None
    missing = "Picture not found: give its folder by --images" if record.image else "No picture in this record"
    truth = " | ".join(dict.fromkeys(record.truths))
    answers, scores = [], []
    for label, results in chain:
        said = next((one for one in results.records if one.id == record.id), None)
        if said is not None:
            right = said.scores[protocol].value == (0 if protocol in LOWER_IS_BETTER else 1)
            answers.append(
                make_answer(label, displayed_answers(said.answer, _LONGEST), record.truths[0], correct=right)
            )
            scores.append(f"{100 * said.scores[protocol].value:.0f}")
    asked = Asked(
        displayed_answers(record.id, 80),
        displayed_answers(record.question, _LONGEST),
        displayed_answers(truth, _LONGEST),
        tuple(answers),
        (),
    )
    height = "" if record.letter_height is None else f", letters {record.letter_height:.1f} px"
    return ScoredCard(GalleryCard(image, missing, (asked,)), f"{protocol} {' → '.join(scores)} %{height}")
