"""The detailed style: text and layout of each kind of image. Sizes are fractions of the image's width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from llavar_peft.datagen.synth.scene import Align, Colour, Pen, Scene, Shape, draw_colours, draw_paper
from llavar_peft.datagen.synth.synth_settings import SynthKind
from llavar_peft.datagen.synth.vocabulary import (
    Vocabulary,
    draw_code,
    draw_date,
    draw_hour,
    draw_name,
    draw_number,
    draw_phrase,
    draw_price,
    draw_sentence,
)


def draw_detailed(kind: SynthKind, rng: Random, width: int, words: Vocabulary, faces: Sequence[str]) -> Scene:
    """Return the scene of an image of a kind, with words of a language.

    Args:
        rng: Source of all random choices.
        width: Pixels.
        faces: Fonts that have all its letters.
    """
    layouts: dict[SynthKind, Callable[[Pen], Scene]] = {
        "receipts": _receipt,
        "covers": _cover,
        "signs": _sign,
        "documents": _document,
        "posters": _poster,
        "invoices": _invoice,
    }
    return layouts[kind](Pen(rng, words, faces, width))


def _receipt(pen: Pen) -> Scene:
    rng, words, width = pen.rng, pen.words, pen.width
    paper, pen.ink = draw_paper(rng)
    face, heavy = rng.choice(pen.faces), rng.choice(pen.faces)
    size, margin = round(width * rng.uniform(0.034, 0.048)), width * rng.uniform(0.05, 0.1)
    left, right = margin, width - margin
    shapes: list[Shape] = []
    shop = draw_name(rng, words)
    pen.y = margin
    pen.line(shop, heavy, size * 1.6, left, right, "centre")
    pen.line(
        f"{draw_phrase(rng, words, 1, 1)} {draw_number(rng, rng.randint(1, 3))}", face, size, left, right, "centre"
    )
    pen.gap(size * 0.8)
    date, hour, number = draw_date(rng), draw_hour(rng), draw_number(rng, 5)
    _row(pen, f"{words.number} {number}", f"{date} {hour}", face, size, left, right)
    _rule(pen, shapes, left, right, size)
    items = rng.sample(words.items, rng.randint(2, 8))
    prices = [draw_price(rng, rng.randint(1, 2)) for _ in items]
    for item, price in zip(items, prices, strict=True):
        _row(pen, item, price, face, size, left, right)
    _rule(pen, shapes, left, right, size)
    cents = sum(round(float(price) * 100) for price in prices)
    tax = cents * rng.choice((5, 7, 19, 20)) // 100
    total = f"{(cents + tax) / 100:.2f}"
    _row(pen, words.subtotal, f"{cents / 100:.2f}", face, size, left, right)
    _row(pen, words.tax, f"{tax / 100:.2f}", face, size, left, right)
    _row(pen, words.total, total, heavy, round(size * 1.25), left, right)
    pen.gap(size * 0.8)
    pen.line(words.thanks, face, size, left, right, "centre")
    questions = [
        ("What is the name of the shop?", shop),
        ("What is the total?", total),
        ("What is the date on the receipt?", date),
        *((f"How much is {item}?", price) for item, price in zip(items, prices, strict=True)),
    ]
    scene = _scene(pen, pen.y + margin, paper, shapes, questions)
    lines = [{"name": item, "price": price} for item, price in zip(items, prices, strict=True)]
    sums = {"subtotal": f"{cents / 100:.2f}", "tax": f"{tax / 100:.2f}", "total": total}
    scene.fields = {"shop": shop, "number": number, "date": date, "items": lines, **sums}
    return scene


def _invoice(pen: Pen) -> Scene:
    rng, words, width = pen.rng, pen.words, pen.width
    paper, pen.ink = draw_paper(rng)
    face, heavy = rng.choice(pen.faces), rng.choice(pen.faces)
    size, margin = max(11, round(width * rng.uniform(0.022, 0.03))), width * rng.uniform(0.07, 0.11)
    left, right, shapes = margin, width - margin, list[Shape]()
    seller, buyer, number, date = draw_name(rng, words), draw_name(rng, words), draw_code(rng), draw_date(rng)
    pen.y = margin
    pen.line(seller, heavy, size * 1.8, left, right, rng.choice(("left", "right")))
    pen.gap(size * 2)
    pen.line(buyer, face, size, left, right)
    pen.gap(size * 2)
    _row(pen, f"{words.number} {number}", date, heavy, size, left, right)
    _rule(pen, shapes, left, right, size)
    items, cents = list[dict[str, str]](), 0
    for name in rng.sample(words.items, rng.randint(1, 6)):
        price, count = draw_price(rng, rng.randint(1, 2)), rng.randint(1, 9)
        amount = count * round(float(price) * 100)
        cents += amount
        item = {"name": name, "quantity": str(count), "price": price, "amount": f"{amount / 100:.2f}"}
        _row(pen, f"{count} x {name}   {price}", item["amount"], face, size, left, right)
        items.append(item)
    _rule(pen, shapes, left, right, size)
    tax = cents * rng.choice((5, 7, 19, 20)) // 100
    sums = {"subtotal": f"{cents / 100:.2f}", "tax": f"{tax / 100:.2f}", "total": f"{(cents + tax) / 100:.2f}"}
    for label, value in ((words.subtotal, sums["subtotal"]), (words.tax, sums["tax"]), (words.total, sums["total"])):
        _row(pen, label, value, face if label != words.total else heavy, size, left, right)
    questions = [
        ("Who sent the invoice?", seller),
        ("What is the total?", sums["total"]),
        ("What is its number?", number),
    ]
    scene = _scene(pen, pen.y + margin, paper, shapes, questions)
    scene.fields = {"seller": seller, "buyer": buyer, "number": number, "date": date, "items": items, **sums}
    return scene


def _row(pen: Pen, label: str, value: str, face: str, size: int, left: float, right: float) -> None:
    """Write a label on the left and a value on the right, reduced in size until both fit."""
    fitted = pen.fit(f"{label}    {value}", face, size, right - left)
    pen.write(label, face, fitted, left, right, "left")
    pen.write(value, face, fitted, left, right, "right")
    pen.y += 1.4 * size


def _rule(pen: Pen, shapes: list[Shape], left: float, right: float, size: float) -> None:
    """Draw a horizontal line, which ends a paragraph."""
    y = round(pen.y + 0.3 * size)
    shapes.append(Shape("line", (round(left), y, round(right), y), pen.ink, max(1, round(size * 0.06))))
    pen.gap(0.8 * size)


def _cover(pen: Pen) -> Scene:
    rng, words, width = pen.rng, pen.words, pen.width
    height = round(width * rng.uniform(1.3, 1.55))
    paper, pen.ink = draw_colours(rng)
    margin = width * rng.uniform(0.06, 0.12)
    left, right = margin, width - margin
    align: Align = rng.choice(("left", "centre", "right"))
    face, heavy = rng.choice(pen.faces), rng.choice(pen.faces)
    title, author = draw_phrase(rng, words, 2, 5), draw_name(rng, words)
    title = title.upper() if rng.random() < 0.4 else title
    longest = max(title.split(), key=len)
    pen.y = height * rng.uniform(0.06, 0.16)
    pen.wrapped(
        title, heavy, pen.fit(longest, heavy, width * rng.uniform(0.09, 0.15), right - left), left, right, align
    )
    pen.gap(width * 0.03)
    if rng.random() < 0.7:
        pen.wrapped(draw_phrase(rng, words, 3, 7), face, round(width * 0.045), left, right, align)
    art = (round(left), round(pen.y + width * 0.05), round(right), round(height * 0.76))
    shapes = [Shape(rng.choice(("area", "ellipse", "frame")), art, draw_colours(rng)[0], round(width * 0.01) + 1)]
    pen.y = height * 0.8
    pen.gap(0)
    pen.line(f"{words.by} {author}" if rng.random() < 0.4 else author, face, width * 0.06, left, right, align)
    pen.y = max(pen.y, height - margin - width * 0.045)
    pen.gap(0)
    publisher = f"{draw_name(rng, words)} {draw_number(rng, 4)}"
    pen.line(publisher, face, width * 0.032, left, right, align)
    questions = [("What is the title of this book?", title), ("Who is the author?", author)]
    return _scene(pen, max(height, pen.y + margin / 2), paper, shapes if art[3] > art[1] else [], questions)


def _sign(pen: Pen) -> Scene:
    rng, words, width = pen.rng, pen.words, pen.width
    paper, pen.ink = draw_colours(rng)
    margin = width * rng.uniform(0.07, 0.13)
    left, right = margin, width - margin
    face = rng.choice(pen.faces)
    says = rng.choice(words.signs)
    below = rng.choice(
        ("", f"{words.room} {draw_number(rng, 3)}", draw_hour(rng), draw_phrase(rng, words, 1, 2).upper())
    )
    pen.y = margin
    for text, share in ((says, 0.24), (below, 0.13)):
        if text:
            pen.line(text, face, width * share * rng.uniform(0.7, 1.0), left, right, "centre")
            pen.gap(width * 0.03)
    height = pen.y + margin
    edge = round(width * 0.02)
    frame = Shape("frame", (edge, edge, width - 1 - edge, round(height) - 1 - edge), pen.ink, round(width * 0.012) + 1)
    questions = [("What does the sign say?", " ".join(line.text for line in pen.lines))]
    if below:
        questions.append(("What is written in the last line?", below))
    return _scene(pen, height, paper, [frame] if rng.random() < 0.6 else [], questions)


def _poster(pen: Pen) -> Scene:
    rng, words, width = pen.rng, pen.words, pen.width
    height = round(width * rng.uniform(1.25, 1.5))
    paper, pen.ink = draw_colours(rng)
    margin = width * rng.uniform(0.06, 0.12)
    left, right = margin, width - margin
    align: Align = rng.choice(("left", "centre"))
    face, heavy = rng.choice(pen.faces), rng.choice(pen.faces)
    name, date, hour = draw_name(rng, words), draw_date(rng), draw_hour(rng)
    name = name.upper() if rng.random() < 0.5 else name
    pen.y = height * rng.uniform(0.05, 0.1)
    pen.line(draw_phrase(rng, words, 1, 3), face, width * 0.05, left, right, align)
    pen.gap(width * 0.03)
    largest = pen.fit(max(name.split(), key=len), heavy, width * rng.uniform(0.1, 0.16), right - left)
    pen.wrapped(name, heavy, largest, left, right, align)
    art = (round(left), round(pen.y + width * 0.06), round(right), round(height * 0.68))
    shapes = [Shape(rng.choice(("area", "ellipse", "frame")), art, draw_colours(rng)[0], round(width * 0.01) + 1)]
    pen.y = max(pen.y, height * 0.72)
    pen.gap(0)
    for text in (date, hour):
        pen.line(text, heavy, width * rng.uniform(0.07, 0.1), left, right, align)
    pen.gap(width * 0.03)
    room = f"{words.room} {draw_number(rng, rng.randint(1, 3))}"
    pen.line(f"{draw_name(rng, words)}, {room}", face, width * 0.045, left, right, align)
    questions = [
        ("What is the name on the poster?", name),
        ("On which date is the show?", date),
        ("At what time does the show start?", hour),
        ("In which room is the show?", room),
    ]
    return _scene(pen, max(height, pen.y + margin / 2), paper, shapes if art[3] > art[1] else [], questions)


def _document(pen: Pen) -> Scene:
    rng, words, width = pen.rng, pen.words, pen.width
    height = round(width * rng.uniform(1.25, 1.42))
    paper, pen.ink = draw_paper(rng)
    face, heavy = rng.choice(pen.faces), rng.choice(pen.faces)
    size, margin = max(11, round(width * rng.uniform(0.019, 0.026))), width * rng.uniform(0.08, 0.11)
    left, right = margin, width - margin
    title, code, date = draw_phrase(rng, words, 2, 5), draw_code(rng), draw_date(rng)
    pen.y = margin * 0.7
    _row(pen, f"{words.number} {code}", date, face, size, left, right)
    pen.gap(size)
    pen.line(title, heavy, size * 1.9, left, right, rng.choice(("left", "centre")))
    bottom = height - margin - 2 * size
    columns = rng.choice((1, 1, 2))
    gutter = 2.5 * size
    column = (right - left - gutter * (columns - 1)) / columns
    pitch, top = rng.uniform(1.2, 1.4), pen.y + size
    for number in range(columns):
        start = left + number * (column + gutter)
        pen.y = top
        pen.gap(0)
        while pen.y < bottom - 9 * pitch * size:
            text = " ".join(draw_sentence(rng, words) for _ in range(rng.randint(1, 3 if columns > 1 else 5)))
            pen.wrapped(text, face, size, start, start + column, pitch=pitch)
            pen.gap(size * rng.uniform(0.9, 1.2))
    pen.y = height - margin * 0.8
    pen.gap(0)
    page = draw_number(rng, rng.randint(1, 3))
    pen.line(f"{words.page} {page}", face, size, left, right, "centre")
    questions = [
        ("What is the title of this document?", title),
        ("What is the reference of this document?", code),
        ("On which date was it written?", date),
        ("Which page is this?", page),
    ]
    return _scene(pen, height, paper, [], questions)


def _scene(pen: Pen, height: float, paper: Colour, shapes: list[Shape], questions: list[tuple[str, str]]) -> Scene:
    return Scene(
        width=pen.width, height=round(height), paper=paper, lines=pen.lines, shapes=shapes, questions=questions
    )
