"""The values of a form's fields: as a flat list, and in a form in which numbers and dates compare as what they mean.

Rules of ``normalize_value``, for the truth and for the answer alike:

* Text: composed letters, single spaces (``unify_text``), lower case. A missing field, ``null`` and empty text are the
  same.
* Dates: ``2024-03-07``, ``2024/3/7``, ``07.03.2024``, ``7/3/24``, ``7-3-2024``, ``7 March 2024`` and ``Mar 7, 2024``
  become ``2024-03-07``. With digits alone, the day comes before the month unless the second number is above 12. Years
  of two digits are 1970 to 2069.
* Numbers: currency signs and codes before or after the number are left out, as are spaces and apostrophes between
  digits. Of ``.`` and ``,`` the last one is the decimal point, unless it occurs several times, or alone before exactly
  three digits of a number that does not start with 0: then it separates thousands. ``1.234,50``, ``1,234.50 EUR``,
  ``$1234.5`` and the JSON number ``1234.5`` are the same. Texts of digits with a leading 0, such as ``0042``, stay
  text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from llavar_peft.data.text_metrics import unify_text

_NAMES: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTHS: Final = {name: number for number, name in enumerate(_NAMES, 1)}
_YEAR_FIRST: Final = re.compile(r"(\d{4})[-./](\d{1,2})[-./](\d{1,2})")
_DAY_FIRST: Final = re.compile(r"(\d{1,2})([-./])(\d{1,2})\2(\d{4}|\d{2})")
_DAY_NAMED: Final = re.compile(r"(\d{1,2})(?:st|nd|rd|th)?[ .-]*([a-z]{3})[a-z]*[ .,-]*(\d{4}|\d{2})")
_MONTH_NAMED: Final = re.compile(r"([a-z]{3})[a-z]*[ .-]*(\d{1,2})(?:st|nd|rd|th)?[ .,-]+(\d{4}|\d{2})")
_CURRENCY: Final = r"(?:[$€£¥₩₹฿]|rp|rm|usd|eur|gbp|jpy|chf|idr|myr|krw|inr|cny|cad|aud|zł|pln|kr|fr)\.?"
_NUMBER: Final = re.compile(
    rf"(?:{_CURRENCY})?\s*([+-]?)\s*(?:{_CURRENCY})?\s*(\d[\d.,'’ ]*|[.,]\d+)\s*(?:{_CURRENCY})?(-?)"
)
_LIKE_THOUSANDS: Final = re.compile(r"-?[1-9]\d*\.\d{3}")
_LONGEST_NUMBER: Final = 40
_OLDEST: Final = 70  # of years with two digits


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each leaf; entries of a list have the path of the list.

    Source: Donut, ``JSONParseEvaluator.flatten``, which CORD's F1 is computed with.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from flatten(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from flatten(inner, path)
    else:
        yield path, value


def normalize_value(value: Any) -> str:
    """Return a value in the form in which it is compared, empty for a missing one; the rules are above."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _plain(Decimal(repr(value))) or str(value)
    text = unify_text(str(value)).lower()
    return _as_date(text) or _as_number(text) or text


def parse_fields(answer: str) -> Any:
    """Return the JSON object or list of an answer; None if it is none."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _as_date(text: str) -> str:
    if found := _YEAR_FIRST.fullmatch(text):
        return _date(found[1], found[2], found[3])
    if found := _DAY_FIRST.fullmatch(text):
        day, month = (found[3], found[1]) if int(found[3]) > 12 else (found[1], found[3])
        return _date(found[4], month, day)
    if (found := _DAY_NAMED.fullmatch(text)) and found[2] in _MONTHS:
        return _date(found[3], str(_MONTHS[found[2]]), found[1])
    if (found := _MONTH_NAMED.fullmatch(text)) and found[1] in _MONTHS:
        return _date(found[3], str(_MONTHS[found[1]]), found[2])
    return ""


def _date(year: str, month: str, day: str) -> str:
    whole = int(year) if len(year) == 4 else int(year) + (1900 if int(year) >= _OLDEST else 2000)
    try:
        return date(whole, int(month), int(day)).isoformat()
    except ValueError:  # 31.02.2024
        return ""


def _as_number(text: str) -> str:
    found = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if found is None:
        return ""
    digits = re.sub(r"['’ ]", "", found[2])
    if digits.isdigit():
        return "" if len(digits) > 1 and digits[0] == "0" else _plain(Decimal(f"{found[1] or found[3]}{digits}"))
    last = digits[max(digits.rfind("."), digits.rfind(","))]
    alone = "." not in digits or "," not in digits
    whole, _, rest = digits.rpartition(last)
    thousands = digits.count(last) > 1 or (alone and len(rest) == 3 and whole not in ("", "0"))
    joined = re.sub("[.,]", "", digits if thousands else whole)
    digits = joined if thousands else f"{joined}.{rest}"
    return _plain(Decimal(f"{found[1] or found[3]}{digits}"))


def _plain(number: Decimal) -> str:
    try:
        text = f"{number.normalize():f}"
    except (InvalidOperation, OverflowError):
        return ""
    if _LIKE_THOUSANDS.fullmatch(text):  # as a text, 1.001 would be 1001
        text += "0"
    return "0" if text in ("-0", "") else text
