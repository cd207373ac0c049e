r"""Validate records, and open files of a million records without loading them.

A record is ``{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\n..."}, ...]}``, or
has OpenAI's ``messages`` (``message_records``), or a question and its answer (``question_records``). ``image`` may be
absent (a text-only record) or a list.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.delimited_tables import SUFFIXES
from llavar_peft.data.hub_sources import HUB, TableSelection, is_hub_source
from llavar_peft.data.message_records import is_message, read_messages
from llavar_peft.data.question_records import explain_columns, explain_row, unnamed_image, with_conversation
from llavar_peft.data.record_images import read_images, type_name
from llavar_peft.data.record_index import IndexedFile
from llavar_peft.data.record_tables import Table, open_csv, open_folder, open_hub, open_parquet
from llavar_peft.data.renamed_columns import RenamedColumns
from llavar_peft.errors import DataError, Fault
from llavar_peft.types import Conversation, ImageSource, Role, Turn, expand_home

_SHOWN: Final = 80  # characters of a value in a message
_SPREADSHEETS: Final = (".xls", ".xlsx", ".ods")
_NO_SELECTION: Final = TableSelection()
_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
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
        """Return a record as it is stored, a row of a question with its conversation.

        Raises:
            IndexError: There is no such record.
            DataError: Its line is not JSON.
        """
        part, index_in_part = self._locate(index)
        return with_conversation(part[index_in_part])

    def where(self, index: int) -> str:
        """Return the name of a record in error messages: its file and its index in that file, counted from 0."""
        part, index_in_part = self._locate(index)
        return part.where(index_in_part)

    def _locate(self, index: int) -> tuple[RecordSource, int]:
        """Return the source that holds a record, and the record's index in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def open_records(
    source: Any, cache_dir: str | Path | None = None, selection: TableSelection = _NO_SELECTION
) -> RecordStore:
    """Open records without loading them.

    Args:
        source: One path or several (``.json`` with one array, ``.jsonl``, ``.parquet``, ``.csv``, ``.tsv``, a folder
            that ``datasets`` reads), ``hf://owner/name``, a ``datasets.Dataset``, or a list of dicts.
        cache_dir: Folder for indexes and converted tables. The default is the folder of the file, or the user's cache
            folder if that is read-only.
        selection: Split and configuration of a folder or a data set of the hub, and names of columns.

    Raises:
        DataError: A file is missing, empty, of an unknown format, or malformed, or a table lacks a column.
        EnvironmentFaultError: A data set of the hub cannot be downloaded.
    """
    if isinstance(source, str | Path):
        return RecordStore([_open_part(source, cache_dir, selection)])
    if isinstance(source, Sequence) and all(isinstance(entry, str | Path) for entry in source):
        return RecordStore([_open_part(path, cache_dir, selection) for path in source])
    if isinstance(source, Mapping) or not hasattr(source, "__len__"):
        what = f"are of the wrong type (got {type(source).__name__}, expected a Dataset or a list of records)"
        raise DataError.at("records", what, "give one split; for a stream, the data set's name with streaming")
    rows = Table(source, "records")
    return RecordStore([RenamedColumns(rows, selection.columns) if selection.columns else rows])


def open_filled_records(source: Any, selection: TableSelection = _NO_SELECTION) -> RecordStore:
    """Open records as ``open_records`` does. Raises ``DataError`` if there are none."""
    records = open_records(source, selection=selection)
    if not len(records):
        where = str(source) if isinstance(source, str | Path) else ", ".join(map(str, source))
        raise DataError.at(where, "no records", "give a file with at least one record")
    return records


def check_source_exists(source: str | Path) -> None:
    """Raise ``DataError`` if records are neither a data set of the hub nor a path that exists."""
    path = expand_home(source)
    if not is_hub_source(source) and not path.exists():
        fix = "correct the path to the records"
        if _HUB_NAME.fullmatch(str(source)) and not path.parent.is_dir():
            fix += f", or write {HUB}{source} for the data set of the hub"
        raise DataError.at(str(path), "no such file", fix)


def _open_part(source: str | Path, cache_dir: str | Path | None, selection: TableSelection) -> RecordSource:
    """Open one path or hub name, rename its columns, and check that it has those of a conversation."""
    opened = _open_path(source, cache_dir, selection)
    records: RecordSource = RenamedColumns(opened, selection.columns) if selection.columns else opened
    if isinstance(opened, Table) and len(opened):
        _check_columns(records, None if selection.columns else opened.names)
    return records


def _check_columns(table: RecordSource, names: Iterable[str] | None) -> None:
    """Raise ``DataError`` if a table lacks the columns of a conversation, once instead of for each row.

    Args:
        table: The rows.
        names: The names of its columns; None takes them from the first row.
    """
    where = table.where(0).rpartition(":")[0]
    if names is not None and (fault := explain_columns(names)) is not None:
        raise DataError.at(where, *fault)
    try:
        first = table[0]
    except DataError:
        if names is None:
            raise
        return  # the check of the records names the row
    if (fault := explain_columns(first) or unnamed_image(first)) is not None:
        raise DataError.at(where, *fault)


def _open_path(source: str | Path, cache_dir: str | Path | None, selection: TableSelection) -> RecordSource:
    if is_hub_source(source):
        return open_hub(str(source), selection, cache_dir)
    path = expand_home(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        return open_folder(path, selection, cache_dir)
    if suffix in (".json", ".jsonl"):
        _check_no_selection(path, selection, ("split", "config", "streaming"))
        return IndexedFile(path, cache_dir)
    check_source_exists(path)
    if suffix == ".parquet":
        _check_no_selection(path, selection, ("config",))
        return open_parquet(path, selection, cache_dir)
    if suffix in SUFFIXES:
        _check_no_selection(path, selection, ("split", "config", "streaming"))
        return open_csv(path, selection, cache_dir)
    if suffix in _SPREADSHEETS:
        what = f"is a spreadsheet ({suffix}), expected a table of texts or records"
        raise DataError.at(str(path), what, "save it as CSV in UTF-8, with the columns image, question and answer")
    raise DataError.at(
        str(path),
        f"unknown file format (got {suffix or 'no extension'!r}, expected .json, .jsonl, .parquet, .csv or .tsv)",
        "convert the file to one of these formats, or give a folder written by datasets.save_to_disk",
    )


def _check_no_selection(path: Path, selection: TableSelection, names: Sequence[str]) -> None:
    for name in names:
        if getattr(selection, name):
            what = f"{name!r} is set, but a {path.suffix} file has none"
            if name == "streaming":
                what = f"'streaming' is set, but a {path.suffix} file is never loaded as a whole anyway"
            raise DataError.at(str(path), what, f"remove {name!r}")


def parse_record(raw: Any, where: str) -> Conversation:
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
            f"the record has the wrong type (got {type_name(raw)}, expected an object)",
            'write the record as {"id": ..., "conversations": [...]}',
        )
    faults: list[Fault] = []
    raw = with_conversation(raw)
    identity = _identity(raw, where, faults)
    images = read_images(raw, where, faults)
    turns, images, system = _read_turns(raw, images, where, faults)
    placeholders = count_placeholders(turns)
    if len(images) > 1 and turns and placeholders != len(images):
        what = f"the number of {IMAGE_PLACEHOLDER} is wrong (got {placeholders}, expected {len(images)}: one per image)"
        faults.append(Fault(where, what, f"write {IMAGE_PLACEHOLDER} once for each image"))
    if faults:
        raise DataError("\n".join(str(fault) for fault in faults), faults)
    return Conversation(identity, turns, images, system)


def count_placeholders(turns: Iterable[Turn]) -> int:
    """Return the number of places of images: ``<image>`` in human turns, or their parts that are images."""
    return sum(
        turn.text.count(IMAGE_PLACEHOLDER) if turn.parts is None else turn.parts.count(None)
        for turn in turns
        if turn.role == "human"
    )


def text_without_images(turn: Turn) -> str:
    """Return the text of a human turn without the places of its images."""
    if turn.parts is None:
        return turn.text.replace(IMAGE_PLACEHOLDER, "").strip()
    return "".join(part for part in turn.parts if part is not None).strip()


def _identity(raw: Mapping[str, Any], where: str, faults: list[Fault]) -> str:
    identity = raw.get("id")
    if identity is None:
        return where.rpartition(":")[2]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        what = f"wrong type (got {type_name(identity)}, expected a string or an integer)"
        faults.append(Fault(f"{where}: id", what, "write the id as a string"))
    return str(identity)


def _read_turns(
    raw: Mapping[str, Any], images: tuple[ImageSource, ...], where: str, faults: list[Fault]
) -> tuple[tuple[Turn, ...], tuple[ImageSource, ...], str | None]:
    """Return a record's turns, its images in their order in the turns, and its system prompt."""
    key, stored_turns = _find_stored_turns(raw, where, faults)
    if key is None:
        return (), images, None
    if key == "conversations" and not is_message(next(iter(stored_turns), None)):
        return _read_conversations(stored_turns, where, faults), images, None
    faults_before = len(faults)
    messages = read_messages(stored_turns, images, f"{where}: {key}", faults)
    turns = messages.turns[1:] if messages.turns and messages.turns[0].role == "gpt" else messages.turns
    if not turns and len(faults) == faults_before:
        fix = "add the question as a message of the user, or remove the record"
        faults.append(Fault(where, "has no message of the user", fix))
    return turns, messages.images, messages.system


def _find_stored_turns(raw: Mapping[str, Any], where: str, faults: list[Fault]) -> tuple[str | None, Sequence[Any]]:
    """Return the key of a record's turns or messages, and their list; None without exactly one such list."""
    keys = [key for key in ("conversations", "messages") if raw.get(key) is not None]
    if len(keys) == 1 and isinstance(raw[keys[0]], list | tuple):
        return keys[0], raw[keys[0]]
    if not keys:
        what, fix = explain_row(raw)
    elif len(keys) == 1:
        key = keys[0]
        what = f"{key!r} has the wrong type (got {type_name(raw[key])}, expected a list)"
        examples = {
            "conversations": '[{"from": "human", "value": "..."}, ...]',
            "messages": '[{"role": "user", "content": "..."}, ...]',
        }
        fix = f"write it as {examples[key]}"
    else:
        what, fix = "has 'conversations' and 'messages', expected one of them", "remove one of the two keys"
    faults.append(Fault(where, what, fix))
    return None, ()


def _read_conversations(stored_turns: Sequence[Any], where: str, faults: list[Fault]) -> tuple[Turn, ...]:
    """Read turns of LLaVA's format, without a leading ``gpt`` turn."""
    faults_before = len(faults)
    readable = (_read_turn(turn, where, number, faults) for number, turn in enumerate(stored_turns))
    turns = [turn for turn in readable if turn is not None]
    num_dropped = 1 if turns and turns[0].role == "gpt" else 0
    turns = turns[num_dropped:]
    if len(faults) > faults_before:
        return tuple(turns)
    if not turns:
        fix = "add the question as a turn from 'human', or remove the record"
        faults.append(Fault(where, "has no turn from 'human'", fix))
    for number, turn in enumerate(turns):
        expected = "gpt" if number % 2 else "human"
        if turn.role != expected:
            at = f"{where}: conversations[{number + num_dropped}]"
            what = f"the turns do not alternate (got {turn.role!r}, expected {expected!r})"
            faults.append(Fault(at, what, "alternate turns from 'human' and 'gpt'"))
            break  # the turns after it would all be reported too
    return tuple(turns)


def _read_turn(turn: object, where: str, number: int, faults: list[Fault]) -> Turn | None:
    """Read a turn of LLaVA's format; None if it is faulty."""
    stored_role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
    role = _ROLES.get(stored_role) if isinstance(stored_role, str) else None
    if role is not None and isinstance(text, str):
        return Turn(role, text)
    at = f"{where}: conversations[{number}]"
    if not isinstance(turn, Mapping):
        what = f"the turn has the wrong type (got {type_name(turn)}, expected an object)"
        faults.append(Fault(at, what, 'write the turn as {"from": "human", "value": "..."}'))
        return None
    if "role" in turn and "content" in turn and "from" not in turn:
        what = "has 'role' and 'content' as in OpenAI's format, expected 'from' and 'value'"
        faults.append(Fault(at, what, 'write the turn as {"from": "human" or "gpt", "value": its text}'))
        return None
    if role is None:
        what = (
            f"unknown role (got {repr(stored_role)[:_SHOWN]}, expected 'human' or 'gpt')"
            if "from" in turn
            else "has no 'from'"
        )
        fix = "set 'from' to 'human' or 'gpt'"
        if stored_role == "system":
            fix = "remove the turn: the chat template adds the system prompt; 'messages' may have their own"
        faults.append(Fault(at, what, fix))
    if not isinstance(text, str):
        what = f"'value' has the wrong type (got {type_name(text)}, expected a string)"
        faults.append(
            Fault(at, what if "value" in turn else "has no 'value'", "write the text of the turn as a string")
        )
    return None
