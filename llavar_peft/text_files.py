r"""Read the text files that users write: records, questions, answers, recipes and every other file of theirs.

All readers of the package take their text and JSON from here, so that an encoding, a line end or a syntax error means
the same, and is reported in the same words, in every file.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from llavar_peft.errors import ConfigError, DataError, Fault, LlavarError
from llavar_peft.text_encodings import (
    detect_unicode,
    explain_encoding,
    find_foreign_format,
    first_undecodable,
    to_utf8,
)

_NEAR: Final = 20  # characters shown on each side of an error
_ESCAPE: Final = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>u[dD][89a-fA-F]..)|.)", re.DOTALL)
_NO_JSON_NUMBER: Final = re.compile(rb"-?(NaN|Inf)")


def check_is_file(path: Path, *, error: type[LlavarError] = DataError, fix: str = "correct the path") -> None:
    """Check that a path leads to a regular file; opening a pipe could wait for ever.

    Args:
        path: The path.
        error: Type of the error.
        fix: What the reader of the message should do.

    Raises:
        LlavarError: It does not.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as problem:
        reason = "no such file"
        if not isinstance(problem, FileNotFoundError):
            reason = f"cannot be read ({getattr(problem, 'strerror', None) or problem})"
        raise error.at(str(path), reason, fix) from problem
    if stat.S_ISDIR(mode):
        raise error.at(str(path), "is a folder, expected a file", fix)
    if not stat.S_ISREG(mode):
        raise error.at(str(path), "is a pipe or a device, expected a file", "save its content to a file, and give that")


def read_bytes(path: Path, *, error: type[LlavarError] = DataError, fix: str = "correct the path") -> bytes:
    """Return a text file in UTF-8, without a byte order mark. The characters of UTF-8 are not checked.

    Args:
        path: UTF-8, UTF-16 or UTF-32, with or without a byte order mark.
        error: Type of the error.
        fix: What the reader of a message about the path should do.

    Raises:
        LlavarError: The file cannot be opened, or is not a file of text.
    """
    check_is_file(path, error=error, fix=fix)
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise error.at(str(path), f"cannot be read ({problem.strerror or problem})", fix) from problem
    return decode_unicode(data, str(path), path, error=error)


def decode_unicode(data: bytes, where: str, path: Path, *, error: type[LlavarError] = DataError) -> bytes:
    """Return the content of a text file in UTF-8, as ``read_bytes`` does."""
    fault = find_foreign_format(where, data[:32])
    form = detect_unicode(data)
    if fault is None:
        try:
            return to_utf8(data, form)
        except UnicodeDecodeError:
            fault = explain_encoding(data[form.mark :], where, path, base=form.mark, encoding=form.encoding)
    raise error(str(fault), (fault,))


def read_text(path: Path, *, error: type[LlavarError] = DataError, fix: str = "correct the path") -> str:
    r"""Return a text file with ``\n`` at the end of its lines.

    Args:
        path: As for ``read_bytes``.
        error: Type of the error.
        fix: What the reader of a message about the path should do.

    Raises:
        LlavarError: The file cannot be opened, or is not text; the message names the byte and the line.
    """
    data = read_bytes(path, error=error, fix=fix)
    if first_undecodable(data) < len(data):
        fault = explain_encoding(data, str(path), path, line=1)
        raise error(str(fault), (fault,))
    if b"\0" in data:
        at = data.index(b"\0")
        line = data.count(b"\n", 0, at) + 1
        what = f"contains a NUL character at byte {at}, line {line}"
        raise error.at(str(path), what, "remove the character, or save the file as text in UTF-8")
    return data.decode().replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, *, fix: str = "correct the file", unique: bool = False, lenient: bool = False) -> Any:
    """Return the value in a JSON file.

    Args:
        path: The file.
        fix: What the reader of a message about the path should do.
        unique: Whether to reject an object that has a key twice; otherwise the last one counts.
        lenient: Whether to accept NaN, and halves of characters: they are in what models answer, and in the files that
            this package writes.

    Raises:
        DataError: The file cannot be read, or is not JSON.
    """
    data = read_bytes(path, fix=fix)
    if not data.strip():
        raise DataError.at(str(path), "the file is empty", fix)
    value = parse_json(data, str(path), path, fix=fix, line=1, lenient=lenient)
    if unique:
        json.loads(data, object_pairs_hook=lambda pairs: _check_unique(pairs, path))
    return value


def _check_unique(pairs: list[tuple[str, Any]], path: Path) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise DataError.at(str(path), f"contains the key {key!r} twice", "remove one of them")
        seen.add(key)


def read_json_lines(
    path: Path,
    *,
    fix: str = "correct the line, or create the file again",
    unfinished: bool = False,
    lenient: bool = False,
    faults: list[Fault] | None = None,
) -> Iterator[tuple[str, Any]]:
    r"""Yield ``(location, value)`` for each line that is not blank, where ``location`` is ``file:line``.

    Only ``\n`` ends a line (or ``\r``, in a file without any ``\n``), because JSON strings may contain other line
    separators such as U+2028.

    Args:
        path: The file.
        fix: What the reader of an error message about a line should do.
        unfinished: Whether another process may still be writing the file. If so, a missing file is an empty one and
            an incomplete last line is skipped.
        lenient: As in ``read_json``; implied by ``unfinished``.
        faults: If given, lines that are not JSON are added to it and skipped.

    Raises:
        DataError: The file cannot be read, or a line is not JSON.
    """
    if unfinished and not path.is_file():
        return
    data, base = read_bytes(path), 0
    if not unfinished and (at := first_undecodable(data)) < len(data):
        breaks = data.count(b"\n", 0, at)
        fault = explain_encoding(data, f"{path}:{breaks + 1}", path)
        if faults is None:
            raise DataError(str(fault), (fault,))
        faults.append(fault)
        return
    lines = data.split(b"\n" if b"\n" in data else b"\r")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        location, start = f"{path}:{number}", base
        base += len(line) + 1
        if not line.strip():
            continue
        try:
            value = parse_json(line, location, path, fix=fix, base=start, lenient=lenient or unfinished)
        except DataError as error:
            if unfinished and number == last:
                return
            if faults is None:
                raise
            faults += error.faults
            continue
        yield location, value


def parse_json(
    data: bytes,
    where: str,
    path: Path,
    *,
    fix: str | None = None,
    base: int = 0,
    line: int | None = None,
    lenient: bool = False,
) -> Any:
    """Return a JSON value.

    Args:
        data: The text in UTF-8.
        where: Name of the text in messages.
        path: The file that contains it.
        fix: What the reader of a message about the syntax should do.
        base: Position of the text in the file, in bytes.
        line: The line of the file that the text begins in, from 1; None for text whose name says it.
        lenient: As in ``read_json``.

    Raises:
        DataError: The text is not JSON.
    """
    try:
        return json.loads(data.decode()) if lenient else msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        fault = explain_json_error(error, data, where, path, fix=fix, base=base, line=line)
        raise DataError(str(fault), (fault,)) from error


def explain_json_error(
    error: Exception,
    data: bytes,
    where: str,
    path: Path,
    *,
    fix: str | None = None,
    base: int = 0,
    line: int | None = None,
    record: str = "",
) -> Fault:
    """Return why a text is not JSON, and where, as far as it is known.

    Args:
        error: The error of the parser, ``json``'s or ``msgspec``'s.
        data: The text in UTF-8.
        where: Name of the text in messages.
        path: The file that contains it.
        fix: What the reader of a message about the syntax should do.
        base: Position of the text in the file, in bytes.
        line: The line of the file that the text begins in, from 1; None for text whose name says it.
        record: Added to the position.
    """
    if isinstance(error, RecursionError):
        return Fault(where, "the JSON is nested too deeply", "remove the value, or write it with fewer levels")
    if first_undecodable(data) < len(data):
        return explain_encoding(data, where, path, base=base, line=line)
    # What msgspec says about these depends on what follows them.
    half = find_half_character(data) if re.search("surrogate|truncated|escape", str(error)) else None
    if half is not None:
        what = f"contains half of a character, {half[1]} (a lone surrogate), at byte {base + half[0]}{record}"
        return Fault(where, what, "write the whole character, or remove the half of it")
    at = json_error_position(error, data)
    reason = re.sub(r"^JSON is malformed: | \(byte \d+\)$|: line \d+ column \d+ \(char \d+\)$", "", str(error))
    reason = reason[:1].lower() + reason[1:]
    if at is None:
        fix = "get the file again: it may have been cut off in a transfer" if "truncated" in reason else fix
        return Fault(where, f"not valid JSON ({reason})", fix or "correct the value")
    if _NO_JSON_NUMBER.match(data[max(0, at - 1) : at + 8].lstrip(b" :,[-")):
        fix = "write null instead of NaN or Infinity, which are not JSON"
    breaks = data.count(b"\n", 0, at)
    place = "" if line is None else f"line {line + breaks}, "
    column = len(data[data.rfind(b"\n", 0, at) + 1 : at].decode(errors="replace")) + 1
    near = data[max(0, at - _NEAR) : at + _NEAR].decode(errors="replace")
    what = f"not valid JSON at {place}column {column}{record} ({reason} at byte {base + at}, near {near!r})"
    return Fault(where, what, fix or "correct the syntax at this position")


def json_error_position(error: Exception, data: bytes) -> int | None:
    """Return the byte at which a parser stopped; None if it does not say so."""
    if isinstance(error, json.JSONDecodeError):
        return len(error.doc[: error.pos].encode(errors="replace"))
    found = re.search(r"\(byte (\d+)\)", str(error))
    return min(int(found[1]), len(data)) if found else None


def find_half_character(data: bytes) -> tuple[int, str] | None:
    r"""Return the position and text of the first lone surrogate that JSON escapes, such as ``\ud83d``."""
    found = next((escape for escape in _ESCAPE.finditer(data) if escape["half"] is not None), None)
    return None if found is None else (found.start(), found[0].decode(errors="replace"))


def text_problem(text: str) -> str | None:
    """Return why a text of a user's file cannot be encoded or shown; None if it can."""
    if "\0" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"contains half of a character, {text[error.start]!a} (a lone surrogate), at position {error.start}"
    return None


def question_problem(text: str) -> str | None:
    """Return why a text is no question for a model; None if it is one."""
    return text_problem(text) if text.strip() else "is empty"


def check_question(text: str) -> None:
    """Check a question that a model is asked.

    Raises:
        ConfigError: It is no string.
        DataError: It is empty, or cannot be encoded.
    """
    if not isinstance(text, str):
        raise ConfigError.at("question", f"got {type(text).__name__}, expected a string", "write the question")
    if problem := question_problem(text):
        raise DataError.at("question", problem, "write a question, in whole characters")
