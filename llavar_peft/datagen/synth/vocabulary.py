"""Words of several languages, and random strings that cannot be guessed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from random import Random
from typing import Final

import msgspec

from llavar_peft.errors import ConfigError

LANGUAGES: Final = ("de", "el", "en", "es", "fr", "it", "pl", "ru")
_DIGITS: Final = "0123456789"
_CODE: Final = "ABCDEFGHJKLMNPRSTUVWXYZ"  # no I, O, Q, which resemble 0 and 1


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words of a language, and the labels that the kinds of image need.

    Attributes:
        words: Common words.
        items: Goods on a receipt.
        signs: Texts of signs, in capitals.
        subtotal: Label on a receipt, as are ``total``, ``tax``, ``cash`` and ``thanks``.
        by: Label of an author's name.
        page: Label of a page number.
        number: Label of a number.
        room: Label of a room number.
    """

    words: tuple[str, ...]
    items: tuple[str, ...]
    signs: tuple[str, ...]
    subtotal: str
    total: str
    tax: str
    cash: str
    thanks: str
    by: str
    page: str
    number: str
    room: str

    @property
    def alphabet(self) -> str:
        """Every character that an image may contain, each once, sorted."""
        totals = (self.subtotal, self.total, self.tax, self.cash)
        labels = (*totals, self.thanks, self.by, self.page, self.number, self.room)
        text = "".join((*self.words, *self.items, *self.signs, *labels, _DIGITS, _CODE))
        return "".join(sorted({*text, *text.upper(), *".,:-/#%"} - {" "}))


@lru_cache(maxsize=len(LANGUAGES))
def load_vocabulary(language: str) -> Vocabulary:
    """Load the packaged words of one of ``LANGUAGES``. Raises ``ConfigError`` for another language."""
    if language not in LANGUAGES:
        raise ConfigError.at("language", f"unknown (got {language!r})", f"use one of {', '.join(LANGUAGES)}")
    text = (resources.files("llavar_peft") / "assets" / "words" / f"{language}.json").read_text("utf-8")
    return msgspec.json.decode(text, type=Vocabulary)


def draw_number(rng: Random, digits: int) -> str:
    """Draw a number without a leading zero."""
    return rng.choice(_DIGITS[1:]) + "".join(rng.choices(_DIGITS, k=digits - 1))


def draw_price(rng: Random, digits: int = 1) -> str:
    """Draw an amount of money with two decimals, e.g. ``"7.25"``."""
    return f"{draw_number(rng, digits)}.{''.join(rng.choices(_DIGITS, k=2))}"


def draw_code(rng: Random) -> str:
    """Draw a reference, e.g. ``"KD-4821"``."""
    return f"{''.join(rng.choices(_CODE, k=2))}-{draw_number(rng, 4)}"


def draw_date(rng: Random) -> str:
    """Draw a date, e.g. ``"07.03.2024"``."""
    return f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}.{rng.randint(1990, 2029)}"


def draw_hour(rng: Random) -> str:
    """Draw a time of day, e.g. ``"18:45"``."""
    return f"{rng.randint(8, 21):02d}:{rng.randint(0, 59):02d}"


def draw_name(rng: Random, words: Vocabulary) -> str:
    """Draw two capitalized words, the name of a shop or a person."""
    return " ".join(_capital(word) for word in rng.sample(words.words, 2))


def draw_phrase(rng: Random, words: Vocabulary, low: int, high: int) -> str:
    """Draw ``low`` to ``high`` words, the first capitalized."""
    return _capital(" ".join(rng.sample(words.words, rng.randint(low, high))))


def draw_sentence(rng: Random, words: Vocabulary) -> str:
    """Draw words with a capital and a full stop, occasionally with a reference or a number among them."""
    chosen = rng.choices(words.words, k=rng.randint(5, 12))
    if rng.random() < 0.3:
        chosen.insert(rng.randint(1, len(chosen)), rng.choice((draw_code(rng), draw_number(rng, rng.randint(1, 4)))))
    if len(chosen) > 7 and rng.random() < 0.5:
        chosen[rng.randint(1, 4)] += ","
    return _capital(" ".join(chosen)) + "."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
