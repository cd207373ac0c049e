"""Read files of JSON lines, with every fault located by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavar_peft.errors import DataError


def read_json_lines(
    path: Path, *, fix: str = "correct the line, or create the file again", unfinished: bool = False
) -> Iterator[tuple[str, Any]]:
    r"""Yield ``(location, value)`` for each line that is not blank, where ``location`` is ``file:line``.

    Only ``\n`` ends a line, because JSON strings may contain other line separators such as U+2028.

    Args:
        path: UTF-8, with or without a byte order mark.
        fix: What the reader of an error message should do.
        unfinished: Whether another process may still be writing the file. If so, a missing file is an empty one and
            an incomplete last line is skipped.

    Raises:
        DataError: The file cannot be read, or a line is not JSON.
    """
    if unfinished and not path.is_file():
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError.at(str(path), f"cannot be read ({error})", "correct the path") from error
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    for place, (number, line) in enumerate(lines, 1):
        location = f"{path}:{number}"
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            if unfinished and place == len(lines):
                return
            raise DataError.at(location, f"is not JSON ({error})", fix) from error
        yield location, value
