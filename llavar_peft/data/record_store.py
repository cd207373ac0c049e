r"""Validate records in the released format, and open files of a million records without loading them.

A record is ``{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\n..."}, ...]}``.
``image`` may be absent (a text-only record) or a list.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.record_index import IndexedFile
from llavar_peft.errors import DataError, Fault, LlavarError, describe_reason
from llavar_peft.types import Conversation, Role, Turn, expand_home

_MAX_PATH: Final = 1024  # characters of the path of an image; a longer text is the image itself
_SCHEME: Final = 32  # characters in which a URL says what it is
_SHOWN: Final = 80
_TABLES: Final = (".csv", ".tsv", ".xls", ".xlsx", ".ods")
_ROLES: Final[dict[str, Role]] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class RecordSource(Protocol):
    """Raw records by index, each with a name for error messages."""

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Return a record as it is stored."""
        ...

    def where(self, index: int) -> str:
        """Return the name of a record for error messages, ending in ``:index``."""
        ...


class Table:
    """Records in memory or in an Arrow table: a ``datasets.Dataset`` or a list of dicts.

    Args:
        rows: The records.
        name: Name of the source in error messages.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Return a row. Raises ``IndexError``."""
        return self.rows[index]

    def where(self, index: int) -> str:
        """Return the name of a row, e.g. ``"records.parquet:17"``, counted from 0."""
        return f"{self.name}:{index}"


class RecordStore(Sequence[Any]):
    """Raw records of several sources, one after the other. Pickles cheaply: a worker process maps the files again."""

    def __init__(self, parts: Sequence[RecordSource]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __repr__(self) -> str:
        return f"RecordStore({len(self):,} records in {len(self.parts)} sources)"

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """Return a record as it is stored. Raises ``IndexError``, or ``DataError`` where its line is not JSON."""
        part, inner = self._find(index)
        return part[inner]

    def where(self, index: int) -> str:
        """Return the name of a record in error messages: its file and its index in that file, counted from 0."""
        part, inner = self._find(index)
        return part.where(inner)

    def _find(self, index: int) -> tuple[RecordSource, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def open_records(source: Any, cache_dir: str | Path | None = None) -> RecordStore:
    """Open records without loading them.

    Args:
        source: One path or several (``.json`` with one array, ``.jsonl``, ``.parquet``, a folder written by
            ``datasets.save_to_disk``), a ``datasets.Dataset``, or a list of dicts.
        cache_dir: Folder for indexes and converted tables. The default is the folder of the file, or the user's cache
            folder if that is read-only.

    Raises:
        DataError: A file is missing, empty, of an unknown format, or malformed.
    """
    if isinstance(source, str | Path):
        return RecordStore([_open_path(expand_home(source), cache_dir)])
    if isinstance(source, Sequence) and all(isinstance(entry, str | Path) for entry in source):
        return RecordStore([_open_path(expand_home(path), cache_dir) for path in source])
    return RecordStore([Table(source, "records")])


def open_filled_records(source: Any) -> RecordStore:
    """Open records as ``open_records`` does. Raises ``DataError`` if there are none."""
    records = open_records(source)
    if not len(records):
        where = str(source) if isinstance(source, str | Path) else ", ".join(map(str, source))
        raise DataError.at(where, "no records", "give a file with at least one record")
    return records


def _open_path(path: Path, cache_dir: str | Path | None) -> RecordSource:
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_folder(path)
    if suffix in (".json", ".jsonl"):
        return IndexedFile(path, cache_dir)
    if not path.exists():
        raise DataError.at(str(path), "no such file", "correct the path to the records")
    if suffix == ".parquet":
        return Table(_read_parquet(path, cache_dir), str(path))
    if suffix in _TABLES:
        what = f"is a table ({suffix}), expected records with conversations"
        fix = "write each row as a record into a .jsonl file, one per line"
        raise DataError.at(str(path), what, fix)
    raise DataError.at(
        str(path),
        f"unknown file format (got {suffix or 'no extension'!r}, expected .json, .jsonl or .parquet)",
        "convert the file to one of these formats, or give a folder written by datasets.save_to_disk",
    )


def _open_folder(path: Path) -> RecordSource:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise DataError.at(
            str(path), f"the folder holds several splits ({', '.join(splits)})", "give one split's folder"
        )
    if not (path / "state.json").is_file():
        raise DataError.at(
            str(path), "the folder was not written by datasets.save_to_disk", "give the file that holds the records"
        )
    from datasets import load_from_disk

    try:
        return Table(_undecoded(load_from_disk(str(path))), str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _read_parquet(path: Path, cache_dir: str | Path | None) -> Any:
    """Convert a Parquet file, which has no random access to rows, to a memory-mapped Arrow file, once."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return _undecoded(Dataset.from_parquet(str(path), cache_dir=None if cache_dir is None else str(cache_dir)))
    except (OSError, ValueError, KeyError, TypeError, DatasetGenerationError) as error:
        raise _unreadable(path, error.__cause__ or error) from error


def _undecoded(table: Any) -> Any:
    """Return a table whose images stay files: a broken one is then reported with its record."""
    from datasets import Image

    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
    return table


def _unreadable(path: Path, error: BaseException) -> LlavarError:
    return DataError.at(
        str(path),
        f"cannot be read ({type(error).__name__}: {describe_reason(error)})",
        "write or download the file again",
    )


def parse_record(raw: object, where: str) -> Conversation:
    """Validate a record and return it as a conversation with its text unchanged.

    A leading ``gpt`` turn is dropped. A single image may be placed by any number of ``<image>``; with several images,
    each needs exactly one. Only human turns place images: in an answer, ``<image>`` is ordinary text.

    Args:
        raw: The record as it is stored.
        where: Name of the record in error messages. The part after the last ``:`` is the id of a record without one.

    Raises:
        DataError: The record is malformed; ``faults`` lists everything that is wrong with it.

    Source: LLaVAR, llava/train/train.py, ``preprocess_v1``.
    """
    if not isinstance(raw, Mapping):
        raise DataError.at(
            where,
            f"the record has the wrong type (got {_type_name(raw)}, expected an object)",
            'write the record as {"id": ..., "conversations": [...]}',
        )
    faults: list[Fault] = []
    identity = _identity(raw, where, faults)
    images = _images(raw, where, faults)
    turns = _turns(raw, where, faults)
    placeholders = count_placeholders(turns)
    if len(images) > 1 and turns and placeholders != len(images):
        what = f"the number of {IMAGE_PLACEHOLDER} is wrong (got {placeholders}, expected {len(images)}: one per image)"
        faults.append(Fault(where, what, f"write {IMAGE_PLACEHOLDER} once for each image"))
    if faults:
        raise DataError("\n".join(str(fault) for fault in faults), faults)
    return Conversation(identity, turns, images)


def count_placeholders(turns: Iterable[Turn]) -> int:
    """Return the number of ``<image>`` that place an image: those in human turns."""
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human")


def _identity(raw: Mapping[str, Any], where: str, faults: list[Fault]) -> str:
    identity = raw.get("id")
    if identity is None:
        return where.rpartition(":")[2]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        what = f"wrong type (got {_type_name(identity)}, expected a string or an integer)"
        faults.append(Fault(f"{where}: id", what, "write the id as a string"))
    return str(identity)


def _images(raw: Mapping[str, Any], where: str, faults: list[Fault]) -> tuple[str, ...]:
    images = raw.get("image")
    if raw.get("video") is not None:
        what, fix = "names a video, expected images", "save frames as images, and list their paths under 'image'"
        faults.append(Fault(f"{where}: video", what, fix))
    if images is None:
        if "images" in raw:
            faults.append(Fault(where, "unknown key (got 'images', expected 'image')", "rename 'images' to 'image'"))
        return ()
    is_list = isinstance(images, list | tuple)
    listed = images if is_list else [images]
    for number, image in enumerate(listed):
        problem = _image_problem(image)
        if problem is None:
            continue
        what, fix = problem
        faults.append(Fault(f"{where}: image[{number}]" if is_list else f"{where}: image", what, fix))
    return tuple(image for image in listed if isinstance(image, str))


def is_image_path(text: str) -> bool:
    """Return whether a text can be the path of an image: it is no URL, no image itself, and not empty."""
    return (0 < len(text) <= _MAX_PATH and ":" not in text[:_SCHEME]) or _image_problem(text) is None


def _image_problem(image: object) -> tuple[str, str] | None:
    """Return why a value of 'image' is no path, and the fix; None for a path."""
    to_file = "save the image as a file in the image folder, and write its path"
    if isinstance(image, str):
        kind = image[:_SCHEME].lower()
        if not image:
            return "the path is empty", "write the path of the image, or leave out 'image' in a text-only record"
        if kind.startswith("data:"):
            return f"is an image in a data URL (got {len(image):,} characters, expected a relative path)", to_file
        if re.match(r"[a-z][a-z0-9+.-]*://", kind):
            return f"is a URL (got {image[:_SHOWN]!r}, expected a relative path)", f"download it: {to_file}"
        if len(image) > _MAX_PATH:
            return f"is too long for a path (got {len(image):,} characters); it may be the image itself", to_file
        return None
    embedded = isinstance(image, Mapping) and ("bytes" in image or "path" in image)
    if embedded or isinstance(image, bytes | bytearray) or hasattr(image, "getpixel"):
        return "is an embedded image, expected a relative path", to_file
    return f"wrong type (got {_type_name(image)}, expected a relative path)", "write the path of the image as a string"


def _turns(raw: Mapping[str, Any], where: str, faults: list[Fault]) -> tuple[Turn, ...]:
    listed = raw.get("conversations")
    if not isinstance(listed, list | tuple):
        what, fix = "has no 'conversations'", 'add "conversations": [{"from": "human", "value": "..."}, ...]'
        if listed is not None:
            what = f"'conversations' has the wrong type (got {_type_name(listed)}, expected a list)"
            fix = 'write it as [{"from": "human", "value": "..."}, ...]'
        elif isinstance(raw.get("messages"), list | tuple):
            what = "has 'messages' as in OpenAI's format, expected 'conversations'"
            fix = 'write each message as {"from": "human" or "gpt", "value": its text} under \'conversations\''
        elif similar := get_close_matches("conversations", [str(key) for key in raw], n=1):
            fix = f"rename {similar[0]!r} to 'conversations'"
        faults.append(Fault(where, what, fix))
        return ()
    before = len(faults)
    turns = [_turn(turn, where, number, faults) for number, turn in enumerate(listed)]
    kept = [turn for turn in turns if turn is not None]
    dropped = 1 if kept and kept[0].role == "gpt" else 0
    kept = kept[dropped:]
    if len(faults) > before:
        return tuple(kept)
    if not kept:
        fix = "add the question as a turn from 'human', or remove the record"
        faults.append(Fault(where, "has no turn from 'human'", fix))
    for number, turn in enumerate(kept):
        expected = "gpt" if number % 2 else "human"
        if turn.role != expected:
            at = f"{where}: conversations[{number + dropped}]"
            what = f"the turns do not alternate (got {turn.role!r}, expected {expected!r})"
            faults.append(Fault(at, what, "alternate turns from 'human' and 'gpt'"))
            break  # the turns after it would all be reported too
    return tuple(kept)


def _turn(turn: object, where: str, number: int, faults: list[Fault]) -> Turn | None:
    role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is not None and isinstance(text, str):
        return Turn(known, text)
    at = f"{where}: conversations[{number}]"
    if not isinstance(turn, Mapping):
        what = f"the turn has the wrong type (got {_type_name(turn)}, expected an object)"
        faults.append(Fault(at, what, 'write the turn as {"from": "human", "value": "..."}'))
        return None
    if "role" in turn and "content" in turn and "from" not in turn:
        what = "has 'role' and 'content' as in OpenAI's format, expected 'from' and 'value'"
        faults.append(Fault(at, what, 'write the turn as {"from": "human" or "gpt", "value": its text}'))
        return None
    if known is None:
        what = (
            f"unknown role (got {repr(role)[:_SHOWN]}, expected 'human' or 'gpt')"
            if "from" in turn
            else "has no 'from'"
        )
        fix = "set 'from' to 'human' or 'gpt'"
        if role == "system":
            fix = "remove the turn: the chat template adds the system prompt"
        faults.append(Fault(at, what, fix))
    if not isinstance(text, str):
        what = f"'value' has the wrong type (got {_type_name(text)}, expected a string)"
        faults.append(
            Fault(at, what if "value" in turn else "has no 'value'", "write the text of the turn as a string")
        )
    return None


def _type_name(value: object) -> str:
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    names = {type(None): "null", bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    return names.get(type(value), type(value).__name__)
