r"""Records: the released format, validated; and stores of a million of them that open at once.

A record is ``{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\n..."}, ...]}``;
``image`` may be missing (text only) or a list.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.record_index import IndexedFile
from llavar_peft.errors import DataError, Fault, LlavarError
from llavar_peft.types import Conversation, Role, Turn

_ROLES: Final[dict[str, Role]] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class RecordPart(Protocol):
    """Records from one source."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int) -> Any:
        """One of them, as it stands there."""
        ...

    def where(self, index: int) -> str:
        """Name one of them in messages."""
        ...


class Table:
    """Records in memory or in an Arrow table: a ``datasets.Dataset``, or a list of dicts.

    Args:
        rows: The records.
        name: Of the source, in messages.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """The row. Raises ``IndexError``."""
        return self.rows[index]

    def where(self, index: int) -> str:
        """Name a row, e.g. ``"records.parquet:17"``, counted from 0."""
        return f"{self.name}:{index}"


class RecordStore(Sequence[Any]):
    """Raw records by index, over all sources in order. Pickles cheaply; workers map the files again.

    Args:
        parts: The sources.
    """

    def __init__(self, parts: Sequence[RecordPart]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """The record as it stands in its file. Raises ``IndexError``, ``DataError`` (its line is not JSON)."""
        part, inner = self._find(index)
        return part[inner]

    def where(self, index: int) -> str:
        """Name a record in messages: file and index within it, counted from 0."""
        part, inner = self._find(index)
        return part.where(inner)

    def _find(self, index: int) -> tuple[RecordPart, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def open_records(source: Any, cache_dir: str | Path | None = None) -> RecordStore:
    """Open records without loading them.

    Args:
        source: A path or several (``.json``: one array; ``.jsonl``; ``.parquet``; a folder written by
            ``datasets.save_to_disk``), a ``datasets.Dataset``, or a list of dicts.
        cache_dir: Where indices and converted tables go; None is beside the file, else the user's cache folder.

    Returns:
        All records, in order.

    Raises:
        DataError: A file is missing, empty, of an unknown kind, or malformed.
    """
    if isinstance(source, str | Path):
        return RecordStore([_open_path(Path(source), cache_dir)])
    if isinstance(source, Sequence) and all(isinstance(entry, str | Path) for entry in source):
        return RecordStore([_open_path(Path(path), cache_dir) for path in source])
    return RecordStore([Table(source, "records")])


def _open_path(path: Path, cache_dir: str | Path | None) -> RecordPart:
    kind = path.suffix.lower()
    if path.is_dir():
        return _open_folder(path)
    if kind in (".json", ".jsonl"):
        return IndexedFile(path, cache_dir)
    if not path.exists():
        raise DataError.at(str(path), "no such file", "correct the path to the records")
    if kind == ".parquet":
        return Table(_read_parquet(path, cache_dir), str(path))
    raise DataError.at(
        str(path),
        f"is of an unknown kind (got {kind or 'no extension'!r})",
        "give .json, .jsonl, .parquet, or a folder written by datasets.save_to_disk",
    )


def _open_folder(path: Path) -> RecordPart:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise DataError.at(str(path), f"holds several splits ({', '.join(splits)})", "give the folder of one of them")
    if not (path / "state.json").is_file():
        raise DataError.at(
            str(path), "is a folder, but not one written by datasets.save_to_disk", "give the file with the records"
        )
    from datasets import load_from_disk

    try:
        return Table(load_from_disk(str(path)), str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _read_parquet(path: Path, cache_dir: str | Path | None) -> Any:
    """Converted once to a memory-mapped Arrow file, since Parquet has no access to single rows."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_parquet(str(path), cache_dir=None if cache_dir is None else str(cache_dir))
    except (OSError, ValueError, KeyError, TypeError, DatasetGenerationError) as error:
        raise _unreadable(path, error.__cause__ or error) from error


def _unreadable(path: Path, error: BaseException) -> LlavarError:
    return DataError.at(str(path), f"cannot be read ({type(error).__name__}: {error})", "write or get it again")


def parse_record(raw: object, where: str) -> Conversation:
    """Validate a record.

    Args:
        raw: As it stands in its file.
        where: Its name in messages; what follows the last ``:`` stands in for a missing id.

    Returns:
        The conversation, its text verbatim. A leading ``gpt`` turn is dropped. A single image may have any number of
        ``<image>``; several must have one each.

    Raises:
        DataError: It is malformed; ``faults`` holds all that is wrong with it.

    Source: LLaVAR, llava/train/train.py, ``preprocess_v1``.
    """
    if not isinstance(raw, Mapping):
        raise DataError.at(where, f"is {_kind(raw)}, expected an object", "write each record as {...}")
    faults: list[Fault] = []
    identity = _identity(raw, where, faults)
    images = _images(raw, where, faults)
    turns = _turns(raw, where, faults)
    places = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if len(images) > 1 and turns and places != len(images):
        what = f"has {places} {IMAGE_PLACEHOLDER} for {len(images)} pictures"
        faults.append(Fault(where, what, f"write {IMAGE_PLACEHOLDER} once for each picture"))
    if faults:
        raise DataError("\n".join(str(fault) for fault in faults), faults)
    return Conversation(identity, turns, images)


def _identity(raw: Mapping[str, Any], where: str, faults: list[Fault]) -> str:
    identity = raw.get("id")
    if identity is None:
        return where.rpartition(":")[2]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        faults.append(Fault(f"{where}: id", f"is {_kind(identity)}, expected text or an integer", "put it in quotes"))
    return str(identity)


def _images(raw: Mapping[str, Any], where: str, faults: list[Fault]) -> tuple[str, ...]:
    images = raw.get("image")
    if images is None:
        if "images" in raw:
            faults.append(Fault(where, "has 'images', expected 'image'", "rename the key"))
        return ()
    listed = images if isinstance(images, list | tuple) else [images]
    for number, image in enumerate(listed):
        if not isinstance(image, str) or not image:
            at = f"{where}: image" + (f"[{number}]" if isinstance(images, list | tuple) else "")
            what = "is empty" if image == "" else f"is {_kind(image)}, expected a relative path"
            fix = "leave 'image' out of a text-only record" if image == "" else "write the picture's path as text"
            faults.append(Fault(at, what, fix))
    return tuple(image for image in listed if isinstance(image, str))


def _turns(raw: Mapping[str, Any], where: str, faults: list[Fault]) -> tuple[Turn, ...]:
    listed = raw.get("conversations")
    if not isinstance(listed, list | tuple):
        similar = get_close_matches("conversations", [str(key) for key in raw], n=1)
        what = (
            f"has {_kind(listed)} as 'conversations', expected a list"
            if listed is not None
            else "has no 'conversations'"
        )
        fix = f"rename {similar[0]!r}" if similar and listed is None else 'write [{"from": "human", "value": ...}, ...]'
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
        faults.append(Fault(where, "has no turn by 'human'", "remove the record, or write what was asked"))
    for number, turn in enumerate(kept):
        expected = "gpt" if number % 2 else "human"
        if turn.role != expected:
            at = f"{where}: conversations[{number + dropped}]"
            faults.append(Fault(at, f"is by {turn.role!r}, expected {expected!r}", "let the turns alternate"))
            break  # whatever follows is out of step too
    return tuple(kept)


def _turn(turn: object, where: str, number: int, faults: list[Fault]) -> Turn | None:
    role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is not None and isinstance(text, str):
        return Turn(known, text)
    at = f"{where}: conversations[{number}]"
    if not isinstance(turn, Mapping):
        faults.append(Fault(at, f"is {_kind(turn)}, expected an object", 'write {"from": ..., "value": ...}'))
        return None
    if known is None:
        what = f"is by {role!r}, expected 'human' or 'gpt'" if "from" in turn else "has no 'from'"
        fix = "the system text belongs to the template: leave it out" if role == "system" else "name who speaks"
        faults.append(Fault(at, what, fix))
    if not isinstance(text, str):
        what = f"has {_kind(text)} as 'value', expected text" if "value" in turn else "has no 'value'"
        faults.append(Fault(at, what, "write the words as text"))
    return None


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "an integer", float: "a number", str: "text"}
    return names.get(type(value)) or (
        "a list"
        if isinstance(value, list | tuple)
        else "an object"
        if isinstance(value, Mapping)
        else type(value).__name__
    )
