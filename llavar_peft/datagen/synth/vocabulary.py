"""Words of several languages, and strings that nobody can guess."""

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
_CODE: Final = "ABCDEFGHJKLMNPRSTUVWXYZ"  # no I, O, Q beside 0 and 1


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A language's words, and the labels that the kinds of image need.

    Attributes:
        words: Common ones.
        items: What a shop sells.
        signs: What signs say, in capitals.
        subtotal: On a receipt; so are ``total``, ``tax``, ``cash`` and ``thanks``.
        by: Before an author's name.
        page: Before a page's number.
        number: Before a number.
        room: Before a room's number.
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
        """Every character that an image may need, each once, sorted."""
        labels = (
            self.subtotal,
            self.total,
            self.tax,
            self.cash,
            self.thanks,
            self.by,
            self.page,
            self.number,
            self.room,
        )
        text = "".join((*self.words, *self.items, *self.signs, *labels, _DIGITS, _CODE))
        return "".join(sorted({*text, *text.upper(), *".,:-/#%"} - {" "}))


@lru_cache(maxsize=len(LANGUAGES))
def load_vocabulary(language: str) -> Vocabulary:
    """Read a language's words.

    Args:
        language: One of ``LANGUAGES``.

    Returns:
        The words.

    Raises:
        ConfigError: There are none of that language.
    """
    if language not in LANGUAGES:
        raise ConfigError.at("language", f"is {language!r}", f"use one of {', '.join(LANGUAGES)}")
    text = (resources.files("llavar_peft") / "assets" / "words" / f"{language}.json").read_text("utf-8")
    return msgspec.json.decode(text, type=Vocabulary)


def draw_number(rng: Random, digits: int) -> str:
    """A number without a leading zero."""
    return rng.choice(_DIGITS[1:]) + "".join(rng.choices(_DIGITS, k=digits - 1))


def draw_price(rng: Random, digits: int = 1) -> str:
    """An amount of money with two decimals, e.g. ``"7.25"``."""
    return f"{draw_number(rng, digits)}.{''.join(rng.choices(_DIGITS, k=2))}"


def draw_code(rng: Random) -> str:
    """A reference, e.g. ``"KD-4821"``."""
    return f"{''.join(rng.choices(_CODE, k=2))}-{draw_number(rng, 4)}"


def draw_date(rng: Random) -> str:
    """A day, e.g. ``"07.03.2024"``."""
    return f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}.{rng.randint(1990, 2029)}"


def draw_hour(rng: Random) -> str:
    """A time of day, e.g. ``"18:45"``."""
    return f"{rng.randint(8, 21):02d}:{rng.randint(0, 59):02d}"


def draw_name(rng: Random, words: Vocabulary) -> str:
    """Two words with capitals, as a shop or a person may be called."""
    return " ".join(_capital(word) for word in rng.sample(words.words, 2))


def draw_phrase(rng: Random, words: Vocabulary, low: int, high: int) -> str:
    """Some words, the first with a capital."""
    return _capital(" ".join(rng.sample(words.words, rng.randint(low, high))))


def draw_sentence(rng: Random, words: Vocabulary) -> str:
    """Words with a capital and a full stop; a reference or a number among them now and then."""
    chosen = rng.choices(words.words, k=rng.randint(5, 12))
    if rng.random() < 0.3:
        chosen.insert(rng.randint(1, len(chosen)), rng.choice((draw_code(rng), draw_number(rng, rng.randint(1, 4)))))
    if len(chosen) > 7 and rng.random() < 0.5:
        chosen[rng.randint(1, 4)] += ","
    return _capital(" ".join(chosen)) + "."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
