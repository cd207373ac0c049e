"""Records in tables: Parquet files, folders and data sets of the hub, opened by ``datasets`` without loading them.

Rows are read from memory-mapped Arrow files. Images stay the bytes of their files, which are views of the mapped file:
a row costs memory only for what is used of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from llavar_peft.data.delimited_tables import SUFFIXES, open_delimited
from llavar_peft.data.hub_sources import TableSelection, is_hub_source, read_hub_source
from llavar_peft.data.record_stream import store_stream
from llavar_peft.errors import DAMAGED, DataError, EnvironmentFaultError, LlavarError, describe_reason

_READ_ERRORS: Final = (*(kind for kind in DAMAGED if kind is not IndexError), NotImplementedError)
"""What datasets and pyarrow raise for damaged files; IndexError means that there is no such row."""
_JSON: Final = "arrow.json"
_AHEAD: Final = 64  # rows that are converted together
_LISTED: Final = re.compile(r"\[('[^\[\]]*')\]")  # names in a message of datasets


class Table:
    """Records in memory or in an Arrow table.

    Args:
        rows: A list of dicts or a ``datasets.Dataset``.
        name: Name of the source in error messages.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = ArrowRows(rows) if hasattr(rows, "cache_files") else rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Return a row. Raises ``IndexError``, or ``DataError`` where it cannot be read."""
        try:
            return self.rows[index]
        except _READ_ERRORS as error:
            what = f"cannot be read ({type(error).__name__}: {describe_reason(error)})"
            raise DataError.at(self.where(index), what, "write or download the file again") from error

    def where(self, index: int) -> str:
        """Return the name of a row, e.g. ``"records.parquet:17"``, counted from 0."""
        return f"{self.name}:{index}"

    @property
    def names(self) -> list[str] | None:
        """The names of the columns; None for rows in memory, each of which has its own."""
        return self.rows.names if isinstance(self.rows, ArrowRows) else None

    def files(self) -> list[Path]:
        """Return the Arrow files that hold the rows; none for rows in memory."""
        return self.rows.files() if isinstance(self.rows, ArrowRows) else []


class ArrowRows(Sequence[Any]):
    """The rows of a ``datasets.Dataset`` as plain values. No image is decoded; bytes are views of the mapped file.

    Rows that are read in their order are converted together, which takes a tenth of the time.
    """

    def __init__(self, table: Any) -> None:
        self._table = table.with_format("arrow")
        schema = table.features.arrow_schema
        self.names = list(map(str, table.column_names))
        self._special = frozenset(field.name for field in schema if _has_special(field.type))
        self._block: tuple[int, list[dict[str, Any]]] = (0, [])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        """Return a row as a dict."""
        start, rows = self._block
        if not start <= index < start + len(rows):
            rows = self._read_block(index) if index == start + len(rows) else []
            self._block = start, rows = index, rows or self._convert(self._table[index : index + 1])
        return rows[index - start]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_block": (0, [])}

    def _read_block(self, index: int) -> list[dict[str, Any]]:
        try:
            return self._convert(self._table[index : index + _AHEAD])
        except _READ_ERRORS:
            return []  # to find the row that cannot be read

    def _convert(self, block: Any) -> list[dict[str, Any]]:
        names = block.column_names
        columns = [
            [_to_python(value) for value in block.column(name)]
            if name in self._special
            else block.column(name).to_pylist()
            for name in names
        ]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def files(self) -> list[Path]:
        """Return the Arrow files of the table."""
        return [Path(entry["filename"]) for entry in self._table.cache_files]


def _has_special(kind: Any) -> bool:
    """Return whether a type contains bytes or JSON texts."""
    if getattr(kind, "extension_name", "") == _JSON or _is_bytes(kind):
        return True
    return any(_has_special(kind.field(number).type) for number in range(kind.num_fields))


def _is_bytes(kind: Any) -> bool:
    return str(kind).partition("[")[0] in ("binary", "large_binary", "binary_view", "fixed_size_binary")


def _to_python(value: Any) -> Any:
    if not value.is_valid:
        return None
    if getattr(value.type, "extension_name", "") == _JSON:
        return json.loads(value.as_py())
    if _is_bytes(value.type):
        return memoryview(value.as_buffer())
    if hasattr(value, "keys"):  # of a struct
        return {name: _to_python(value[name]) for name in value}
    if hasattr(value, "values"):  # of a list
        return [_to_python(one) for one in value.values]
    return value.as_py()


def open_parquet(path: Path, selection: TableSelection, cache_dir: str | Path | None) -> Table:
    """Convert a Parquet file, which has no random access to rows, to a memory-mapped Arrow file, once."""
    settings = {"path": "parquet", "data_files": str(path)}
    return Table(_load(settings, selection, str(path), cache_dir, files=[path]), str(path))


def open_folder(path: Path, selection: TableSelection, cache_dir: str | Path | None) -> Table:
    """Open a folder that ``datasets.save_to_disk`` wrote, or one of files that ``datasets.load_dataset`` reads."""
    saved = path
    if (path / "dataset_dict.json").is_file():
        saved = path / selection.chosen_split
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        if selection.chosen_split not in splits:
            what = f"has no split {selection.chosen_split!r} (got {', '.join(splits) or 'none'})"
            raise DataError.at(str(path), what, "set 'split' to one of these")
    if (saved / "state.json").is_file():
        from datasets import load_from_disk

        try:
            return Table(load_from_disk(str(saved)), str(path))
        except (*DAMAGED, NotImplementedError) as error:
            raise _unreadable(str(path), error) from error
    files = sorted(entry for entry in path.rglob("*") if entry.is_file() and not entry.name.startswith("."))
    if not any(entry.suffix.lower() in (".parquet", ".json", ".jsonl", ".arrow") for entry in files):
        what = "the folder holds no records (expected Parquet or JSON files, or what datasets.save_to_disk writes)"
        fix = "give the file or the folder that holds the records"
        if tables := [str(entry) for entry in files if entry.suffix.lower() in SUFFIXES]:
            fix = f"give the files with tables of text themselves, such as {tables[0]}"
        raise DataError.at(str(path), what, fix)
    return Table(_load({"path": os.path.abspath(path)}, selection, str(path), cache_dir, files=files), str(path))


def open_csv(path: Path, selection: TableSelection, cache_dir: str | Path | None) -> Table:
    """Convert a CSV or TSV file, which has no random access to rows, to a memory-mapped Arrow file, once."""
    return Table(open_delimited(path, [name for _, name in selection.columns], cache_dir), str(path))


def open_hub(source: str, selection: TableSelection, cache_dir: str | Path | None) -> Table:
    """Open a data set of the Hugging Face hub, which is downloaded to the cache of ``datasets`` if it is not there.

    Args:
        source: As in ``read_hub_source``.
        selection: The part of the data set.
        cache_dir: Folder for the Arrow files; None is that of ``datasets``.

    Raises:
        EnvironmentFaultError: The hub cannot be reached, or does not have the data set.
        DataError: The data set has no such split or configuration, or it cannot be read.
    """
    named = read_hub_source(source, selection)
    return Table(_load({"path": named.repository}, named.selection, named.name, cache_dir), named.name)


def _load(
    settings: dict[str, Any],
    selection: TableSelection,
    where: str,
    cache_dir: str | Path | None,
    files: Sequence[Path] = (),
) -> Any:
    """Return a memory-mapped ``datasets.Dataset``.

    Args:
        settings: What ``load_dataset`` is to open.
        selection: The part of it.
        where: Its name in messages.
        cache_dir: Folder for the Arrow files.
        files: The files of a local data set, whose sizes and times are part of a stream's name in the cache.
    """
    from datasets import load_dataset, load_dataset_builder

    given = {**settings, "name": selection.config, "split": selection.chosen_split}
    if given["path"] == "parquet":
        given["name"] = None
    try:
        if selection.streaming:
            stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            split = given.pop("split")
            builder = load_dataset_builder(**given)  # whose hash is the revision of a data set of the hub
            rows = builder.as_streaming_dataset(split=split)
            return store_stream(rows, [given, split, builder.hash, stamps], where, cache_dir)
        return load_dataset(**given, cache_dir=None if cache_dir is None else str(cache_dir))
    except LlavarError:
        raise
    except Exception as error:  # the client of the hub passes on any error of its transport
        raise _explain(error, where, selection) from error


def _explain(error: Exception, where: str, selection: TableSelection) -> LlavarError:
    """Return the error for a data set that ``datasets`` did not open."""
    reason = describe_reason(error)
    if "Unknown split" in reason or "Bad split" in reason:
        known = next(iter(_LISTED.findall(reason)), reason)
        return DataError.at(
            where, f"has no split {selection.chosen_split!r} (got {known})", "set 'split' to one of these"
        )
    if "BuilderConfig" in reason or "Config name is missing" in str(error):
        known = next(iter(_LISTED.findall(str(error))), reason)
        what = f"has no configuration {selection.config!r} (got {known})"
        return DataError.at(where, what, "set 'config' to one of these")
    if "scripts are no longer supported" in reason:
        return DataError.at(where, "needs a program of its own, which is not run", "use a version of it in Parquet")
    if not is_hub_source(where):
        return _unreadable(where, error.__cause__ or error)
    return _explain_hub(error, reason, where)


def _explain_hub(error: Exception, reason: str, where: str) -> LlavarError:
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE and isinstance(error, ConnectionError):
        what = "is not in the cache of datasets, and HF_HUB_OFFLINE is set"
        return EnvironmentFaultError.at(where, what, "unset HF_HUB_OFFLINE, or give a file or a folder")
    if isinstance(error, DatasetNotFoundError):
        if "gated" in reason:
            return EnvironmentFaultError.at(
                where, "needs a permission", "request it on the data set's page, and run `hf auth login`"
            )
        fix = "check the name, or run `hf auth login` for a private one"
        return EnvironmentFaultError.at(where, "the hub has no public data set of this name", fix)
    if isinstance(error, DatasetsError | ValueError | KeyError | TypeError):
        return _unreadable(where, error.__cause__ or error)
    what = f"cannot be downloaded from the Hugging Face hub ({reason})"
    return EnvironmentFaultError.at(where, what, "check the connection, or give a file or a folder")


def _unreadable(where: str, error: BaseException) -> LlavarError:
    return DataError.at(
        where, f"cannot be read ({type(error).__name__}: {describe_reason(error)})", "write or download the file again"
    )
