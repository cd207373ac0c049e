"""Decode images that are written as data URLs: ``data:image/png;base64,...``."""

from __future__ import annotations

import base64
import re
from typing import Final
from urllib.parse import unquote

# Any media type is accepted, because programs often name a wrong one or none; the bytes say what the file is.
_HEAD: Final = re.compile(
    r"data:(?:[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,80})?(?:;[a-z0-9=.\"-]{1,40}){0,3};base64,", re.IGNORECASE
)
_STANDARD_BASE64: Final = str.maketrans("-_", "+/", "\r\n\t =")
"""Removes line breaks and padding, and turns the alphabet of URLs into the usual one."""


def split_data_url(url: str) -> str | None:
    """Return the base64 text of a data URL; None if it is no data URL in base64."""
    head = _HEAD.match(url)
    return None if head is None else url[head.end() :]


def decode_base64(text: str) -> bytes:
    """Return the bytes of a data URL's base64 text, with or without padding, percent signs and line breaks.

    Raises:
        ValueError: It is not base64.
    """
    digits = (unquote(text) if "%" in text else text).translate(_STANDARD_BASE64)
    return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
