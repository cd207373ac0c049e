"""Read records under the expected names of columns, where a recipe or an option gives the names that they have."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Protocol

from llavar_peft.data.question_records import NAMES
from llavar_peft.errors import ConfigError, DataError

_CONVERSATIONS: Final = ("conversations", "messages", "texts")
_MOST_LISTED: Final = 12  # names of columns in a message


class _Records(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def where(self, index: int) -> str: ...


class RenamedColumns:
    """Records by index, with some columns under the expected names.

    Args:
        source: The records.
        columns: Pairs of an expected name and the name of the column; ``query.en`` is a key in a column.
    """

    def __init__(self, source: _Records, columns: tuple[tuple[str, str], ...]) -> None:
        self.source = source
        self.columns = columns
        roles = {role for role, _ in columns}
        hidden = {name for role in roles for name in NAMES[role]} | {column for _, column in columns}
        if roles & {"question", "answer"}:
            hidden.update(_CONVERSATIONS)
        self._hidden = hidden

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        """Return a record with its renamed columns."""
        raw = self.source[index]
        if not isinstance(raw, Mapping):
            return raw
        renamed = {role: self._find(raw, column, index) for role, column in self.columns}
        others = {name: value for name, value in raw.items() if name not in self._hidden}
        return {**others, **renamed}

    def where(self, index: int) -> str:
        """Return the name of a record in error messages."""
        return self.source.where(index)

    def files(self) -> list[Path]:
        """Return the Arrow files that hold the rows; none for others."""
        files = getattr(self.source, "files", None)
        return [] if files is None else list(files())

    def _find(self, raw: Mapping[str, Any], name: str, index: int) -> Any:
        """Return the value of a column, or of a key in one. Raise ``DataError`` if there is none."""
        if name in raw:
            return raw[name]
        column, _, key = name.partition(".")
        if key and isinstance(raw.get(column), Mapping) and key in raw[column]:
            return raw[column][key]
        names = list(map(str, raw))
        similar = get_close_matches(name, names, n=1)
        fix = f"write {similar[0]!r}" if similar else "set it to one of these"
        listed = ", ".join(column_name[:40] for column_name in names[:_MOST_LISTED])
        raise DataError.at(self.where(index), f"has no column {name[:80]!r} (got {listed})", f"in 'columns', {fix}")


def read_columns(given: Mapping[str, str], where: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs of ``RenamedColumns``.

    Args:
        given: The names of the columns by the names that are looked for.
        where: Name of the setting in messages.

    Raises:
        ConfigError: A name that is looked for is unknown, or a column has no name.
    """
    for name, column in given.items():
        if name not in NAMES or not column:
            what = (
                f"{name[:40]!r} is unknown, expected {', '.join(NAMES)}" if column else f"{name[:40]!r} has no column"
            )
            raise ConfigError.at(where, what, "write question=NAME with the name of your column")
    return tuple(given.items())
