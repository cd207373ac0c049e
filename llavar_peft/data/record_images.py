"""The images that a record names or contains, under the keys and in the forms in which data sets are published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from llavar_peft.data.data_urls import decode_base64, split_data_url
from llavar_peft.data.pdf_pages import page_name, split_page
from llavar_peft.errors import Fault
from llavar_peft.types import EmbeddedImage, ImageSource

_MAX_PATH: Final = 1024  # characters of the path of an image; a longer text is the image itself
_SCHEME: Final = 32  # characters in which a URL says what it is
_SHOWN: Final = 80  # characters of a value in a message
_BYTES = bytes | bytearray | memoryview
_TO_FILE: Final = "save the image as a file in the image folder, and write its path"


def read_images(raw: Mapping[str, Any], where: str, faults: list[Fault]) -> tuple[ImageSource, ...]:
    """Return the images under a record's keys, and add what is wrong with them to ``faults``.

    Args:
        raw: The record as it is stored.
        where: Name of the record in error messages.
        faults: Gets a fault for each value that is no image.
    """
    if raw.get("video") is not None:
        what, fix = "names a video, expected images", "save frames as images, and list their paths under 'image'"
        faults.append(Fault(f"{where}: video", what, fix))
    keys = image_keys(raw)
    if len(keys) > 1:
        what = f"names images under {keys[0]!r} and under {keys[1]!r}, expected one key"
        faults.append(Fault(where, what, "keep one of the keys"))
        return ()
    if not keys:
        return ()
    key = keys[0]
    if isinstance(raw[key], list | tuple):
        value_of = {f"{key}[{number}]": value for number, value in enumerate(raw[key])}
    else:
        value_of = {key: raw[key]}
    images = [read_image(value, f"{where}: {name}", name, faults) for name, value in value_of.items()]
    return tuple(image for image in images if image is not None)


def image_keys(raw: Mapping[str, Any]) -> list[str]:
    """Return the keys of a record that hold its images; each holds one image or a list.

    Next to an image, ``image_url`` says where it came from.
    """
    keys = [key for key in ("image", "images") if _has_images(raw.get(key))]
    return keys or [key for key in ("image_url",) if _has_images(raw.get(key))]


def _has_images(value: object) -> bool:
    """Return whether the value of a key says that there are images; tables fill what a record lacks with nulls."""
    if isinstance(value, Mapping):
        return any(part is not None for part in value.values()) or not value
    return value is not None and not (isinstance(value, list | tuple) and not value)


def read_image(value: object, where: str, name: str, faults: list[Fault]) -> ImageSource | None:
    """Return an image that is given as a path, as bytes, or as a mapping of these.

    Args:
        value: A path, a data URL, the bytes of a file, ``{"bytes": ..., "path": ...}`` or ``{"url": ...}``.
        where: Its place in error messages.
        name: Name of an embedded image: its place in the record.
        faults: Gets a fault if it is none of these; then the result is None.
    """
    path = value
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if isinstance(content, _BYTES):
            if isinstance(path, str) and path and path.isprintable() and len(path) <= _SHOWN:
                return EmbeddedImage(_as_view(content), f"{name} ({path})", path)
            return EmbeddedImage(_as_view(content), name)
        if content is not None:
            what = f"is an embedded image whose bytes are {type_name(content)}, expected bytes in a table or a path"
            faults.append(Fault(where, what, _TO_FILE))
            return None
        path = value.get("url") if path is None else path
    elif isinstance(value, _BYTES):
        return EmbeddedImage(_as_view(value), name)
    if isinstance(path, str) and path[:_SCHEME].lstrip()[:5].lower() == "data:":
        return _read_data_url(path.strip(), where, name, faults)
    problem = _image_problem(path)
    if problem is None and isinstance(path, str):
        return path
    what, fix = problem or ("is no image", _TO_FILE)
    faults.append(Fault(where, what, fix))
    return None


def _read_data_url(url: str, where: str, name: str, faults: list[Fault]) -> EmbeddedImage | None:
    file, page = split_page(url)
    text = split_data_url(file)
    try:
        data = b"" if text is None else decode_base64(text)
    except ValueError as error:
        faults.append(Fault(where, f"is a data URL that is not valid base64 ({error})", _TO_FILE))
        return None
    if data:
        return EmbeddedImage(data, name, None if page is None else page_name("document.pdf", page))
    what = f"is a data URL without base64 (got {url[:_SCHEME]!r}, expected 'data:image/png;base64,...')"
    faults.append(Fault(where, what, _TO_FILE))
    return None


def is_image_path(text: str) -> bool:
    """Return whether a text can be the path of an image: it is no URL, no image itself, and not empty."""
    return (0 < len(text) <= _MAX_PATH and ":" not in text[:_SCHEME]) or _image_problem(text) is None


def _image_problem(image: object) -> tuple[str, str] | None:
    """Return why a value is no path of an image, and the fix; None for a path."""
    if isinstance(image, str):
        beginning = image[:_SCHEME].lstrip().lower()
        if not image:
            return "the path is empty", "write the path of the image, or leave out 'image' in a text-only record"
        if beginning.startswith("data:"):
            return "is a data URL, expected a relative path", _TO_FILE
        if re.match(r"[a-z][a-z0-9+.-]*://", beginning):
            return f"is a URL (got {image[:_SHOWN]!r}, expected a relative path)", f"download it: {_TO_FILE}"
        if len(image) > _MAX_PATH:
            return f"is too long for a path (got {len(image):,} characters); it may be the image itself", _TO_FILE
        return None
    if hasattr(image, "getpixel"):
        return "is an image in memory, expected a relative path", _TO_FILE
    return f"wrong type (got {type_name(image)}, expected a relative path)", "write the path of the image as a string"


def _as_view(content: bytes | bytearray | memoryview) -> bytes | memoryview:
    return bytes(content) if isinstance(content, bytearray) else content


def type_name(value: object) -> str:
    """Return the type of a JSON value in words, for messages."""
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    names = {type(None): "null", bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    return names.get(type(value), type(value).__name__)
