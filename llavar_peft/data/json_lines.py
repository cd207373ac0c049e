"""Read files of JSON lines, with every fault located by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavar_peft.errors import DataError, Fault, describe_reason


def read_json_lines(
    path: Path,
    *,
    fix: str = "correct the line, or create the file again",
    unfinished: bool = False,
    faults: list[Fault] | None = None,
) -> Iterator[tuple[str, Any]]:
    r"""Yield ``(location, value)`` for each line that is not blank, where ``location`` is ``file:line``.

    Only ``\n`` ends a line, because JSON strings may contain other line separators such as U+2028.

    Args:
        path: UTF-8, with or without a byte order mark.
        fix: What the reader of an error message should do.
        unfinished: Whether another process may still be writing the file. If so, a missing file is an empty one and
            an incomplete last line is skipped.
        faults: If given, lines that are not JSON are added to it and skipped.

    Raises:
        DataError: The file cannot be read, or a line is not JSON.
    """
    if unfinished and not path.is_file():
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError.at(str(path), f"cannot be read ({describe_reason(error)})", "correct the path") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError.at(str(path), "wrong encoding (got UTF-16, expected UTF-8)", "save the file as UTF-8")
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    for place, (number, line) in enumerate(lines, 1):
        location = f"{path}:{number}"
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if unfinished and place == len(lines):
                return
            if faults is None:
                raise DataError.at(location, f"is not JSON ({describe_reason(error)})", fix) from error
            faults.append(Fault(location, f"is not JSON ({describe_reason(error)})", fix))
            continue
        yield location, value


def text_problem(text: str) -> str | None:
    """Return why a text of a user's file cannot be encoded or shown; None if it can."""
    if "\0" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"contains half of a character, {text[error.start]!a} (a lone surrogate), at position {error.start}"
    return None
