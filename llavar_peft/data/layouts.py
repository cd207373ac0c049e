"""Where the words of a synthetic picture stand, and what may be asked about them; nothing is drawn here.

Four kinds of text-rich picture: signs, book covers, posters and receipts. Every string that a question asks for is
random, so a model that has not read the picture cannot answer. Letters that several faces draw alike are left out of
the random strings: no O, I and Q beside 0 and 1, and in small letters only those that differ from their capitals.
Words stand at free positions; the one promise is legibility: a line's letters are on average at least `SMALLEST_PITCH`
of the picture's longer side apart, which is what 12 x 12 patches can resolve.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from llavar_peft.data.fonts import CAP_HEIGHT, text_width

CAPITALS = "ABCDEFGHJKLMNPRSTUVWXYZ"
DIGITS = "0123456789"
FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
"""The fonts of the drawn pictures."""
ITEMS = ("tea", "milk", "soup", "cake", "rice", "bread", "pizza", "salad", "juice", "fish", "egg", "apple", "beans")

SMALLEST_PITCH = 0.085
"""Smallest average distance of neighbouring letters, as a share of the longer side: 10.2 of 120 pixels."""

SMALLEST_SIZE = 0.125
"""Smallest font size, as a share of the longer side: 15 of 120 pixels."""


@dataclass(frozen=True, kw_only=True)
class TextLine:
    """One line of text in a picture.

    Attributes:
        text: What it says.
        font: Its face, one of `FACES`.
        size: Font size in pixels.
        left: Where its first letter starts, in pixels.
        baseline: The line it stands on, in pixels from the top.
    """

    text: str
    font: str
    size: int
    left: int
    baseline: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels, from the top of the capitals to the baseline."""
        width = text_width(self.text, self.font) * self.size
        return self.left, round(self.baseline - CAP_HEIGHT * self.size), round(self.left + width), self.baseline

    def centres(self) -> list[tuple[str, float, float]]:
        """Each character with the x and y of its middle in pixels; y is the middle of the capitals."""
        y = self.baseline - CAP_HEIGHT * self.size / 2
        ends = [self.left + self.size * text_width(self.text[:n], self.font) for n in range(len(self.text) + 1)]
        return [(c, (a + b) / 2, y) for c, a, b in zip(self.text, ends, ends[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A picture before it is drawn.

    Attributes:
        kind: `sign`, `cover`, `poster` or `receipt`.
        width: Pixels.
        height: Pixels.
        lines: The text, in reading order.
        questions: What may be asked, with the answers.
    """

    kind: str
    width: int
    height: int
    lines: tuple[TextLine, ...]
    questions: tuple[tuple[str, str], ...]


def _word(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choices(CAPITALS, k=rng.randint(low, high)))


def _number(rng: Random, length: int) -> str:
    return rng.choice(DIGITS[1:]) + "".join(rng.choices(DIGITS, k=length - 1))


def _price(rng: Random, longest: int) -> str:
    return f"{_number(rng, rng.randint(1, longest))}.{''.join(rng.choices(DIGITS, k=2))}"


_Content: TypeAlias = tuple[list[str], list[tuple[str, str]]]


def _sign(rng: Random) -> _Content:
    words = [_word(rng, 3, 7) for _ in range(rng.choice((1, 1, 2)))]
    lines = list(words)
    asked = [(rng.choice(("What does the sign say?", "Which words are on the sign?")), " ".join(words))]
    if rng.random() < 0.6:
        number = _number(rng, rng.randint(2, 4))
        lines.append(number)
        asked.append(("Which number is on the sign?", number))
    return lines, asked


def _cover(rng: Random) -> _Content:
    words = [_word(rng, 3, 7) for _ in range(rng.choice((1, 2)))]
    author = _word(rng, 4, 7)
    asked = [
        (rng.choice(("What is the title of this book?", "What is the book called?")), " ".join(words)),
        (rng.choice(("Who wrote this book?", "Who is the author?")), author),
    ]
    return [*words, f"BY {author}"], asked


def _poster(rng: Random) -> _Content:
    name = _word(rng, 4, 7)
    date = f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}"
    hour = f"{rng.randint(10, 23)}:{rng.choice(DIGITS[:6])}{rng.choice(DIGITS)}"
    asked = [
        (rng.choice(("Who is playing?", "What is the name on the poster?")), name),
        ("On which date is the show?", date),
        ("At what time does the show start?", hour),
    ]
    return [name, f"ON {date}", f"AT {hour}"], asked


def _receipt(rng: Random, most_items: int = 1) -> _Content:
    shop = _word(rng, 4, 7)
    items = rng.sample(ITEMS, rng.randint(1, most_items))
    prices = [_price(rng, 1) for _ in items]
    total = _price(rng, 2)
    asked = [
        (rng.choice(("What is the name of the shop?", "Which shop is this receipt from?")), shop),
        (rng.choice(("What is the total?", "How much was paid in total?")), total),
        *((f"How much is the {item}?", price) for item, price in zip(items, prices, strict=True)),
    ]
    rows = [f"{item.upper()}\t{price}" for item, price in zip(items, prices, strict=True)]
    return [shop, *rows, f"TOTAL\t{total}"], asked


_CONTENT: dict[str, Callable[[Random], _Content]] = {
    "sign": _sign,
    "cover": _cover,
    "poster": _poster,
    "receipt": _receipt,
}
KINDS: tuple[str, ...] = tuple(_CONTENT)
"""The kinds of picture that can be drawn."""


def _smallest(text: str, font: str, long_side: int) -> float:
    """Font size below which a line is not legible, in pixels."""
    letters = "".join(character for character in text if character.isalnum())
    pitch = text_width(letters, font) / len(letters)
    return long_side * max(SMALLEST_SIZE, SMALLEST_PITCH / pitch)


def _place(
    rng: Random, rows: list[str], font: str, width: int, height: int, *, largest: float
) -> list[TextLine] | None:
    """Try one arrangement; None where it does not fit."""
    long_side, margin = max(width, height), 0.02 * max(width, height)
    room = width - 2 * margin
    sizes: list[int] = []
    for row in rows:
        flat = row.replace("\t", "  ")
        low, high = _smallest(flat, font, long_side), room / text_width(flat, font)
        if high < low:
            return None
        wanted = low * rng.uniform(1.0, 1.25 if "\t" in row or " " in row else largest)
        sizes.append(int(min(high, wanted)) + 1)
    spacing = rng.uniform(1.12, 1.6)
    tall = sum(sizes) * spacing
    if tall > height - 2 * margin:
        least = [int(_smallest(row.replace("\t", "  "), font, long_side)) + 1 for row in rows]
        sizes = [max(low, int(size * 0.7)) for low, size in zip(least, sizes, strict=True)]
        spacing = 1.15
        tall = sum(sizes) * spacing
    if tall > height - 2 * margin:
        return None
    return _stack(rng, rows, sizes, font, spacing, (margin, width - margin, height - margin - tall))


def _stack(
    rng: Random, rows: list[str], sizes: list[int], font: str, spacing: float, area: tuple[float, float, float]
) -> list[TextLine] | None:
    """Stand the rows on top of each other, at a free height; `area` is left, right and the free height."""
    left, right, free = area
    widths = [text_width(row.replace("\t", "  "), font) * size for row, size in zip(rows, sizes, strict=True)]
    if max(widths) > right - left:
        return None
    style = rng.choice(("left", "centre", "free"))
    span = rng.uniform(max(widths), right - left)
    start = rng.uniform(left, right - span)
    top, lines = rng.uniform(left, max(left, free)), list[TextLine]()
    for row, size, width in zip(rows, sizes, widths, strict=True):
        top += size * spacing
        slack = (span - width) * {"left": 0.0, "centre": 0.5, "free": rng.random()}[style]
        baseline = round(top - size * (spacing - 0.9))
        label, _, value = row.partition("\t")
        if not value:
            lines.append(TextLine(text=row, left=round(start + slack), font=font, size=size, baseline=baseline))
            continue
        lines.append(TextLine(text=label, left=round(start), font=font, size=size, baseline=baseline))
        value_left = start + span - text_width(value, font) * size
        lines.append(TextLine(text=value, left=round(value_left), font=font, size=size, baseline=baseline))
    return lines


def draw_layout(
    kind: str, rng: Random, *, shortest: int = 192, longest: int = 448, largest: float = 2.6, most_items: int = 1
) -> Layout:
    """Invent a picture's text, questions and arrangement.

    Args:
        kind: One of `KINDS`.
        rng: Where every choice comes from.
        shortest: Least length of the longer side in pixels.
        longest: Greatest length of the longer side in pixels.
        largest: Greatest size of a single word's letters, as a multiple of the smallest that is legible.
        most_items: Items on a receipt at most, beside its total.

    Returns:
        The layout.

    Raises:
        ValueError: If `kind` is not one of `KINDS`.
    """
    if kind not in _CONTENT:
        raise ValueError(f"no such kind of picture: {kind!r}; there are: {', '.join(KINDS)}")
    while True:
        rows, questions = _receipt(rng, most_items) if kind == "receipt" else _CONTENT[kind](rng)
        long_side, aspect = rng.randint(shortest, longest), rng.uniform(0.7, 1.0)
        wide = rng.random() < 0.6
        width, height = (long_side, round(long_side * aspect)) if wide else (round(long_side * aspect), long_side)
        lines = _place(rng, rows, rng.choice(FACES), width, height, largest=largest)
        if lines is not None:
            return Layout(kind=kind, width=width, height=height, lines=tuple(lines), questions=tuple(questions))
