"""Names of data sets on the Hugging Face hub: ``hf://owner/name/config?split=train``, or ``hub:owner/name``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from llavar_peft.errors import DataError

HUB: Final = "hf://"
"""Before the name of a data set on the hub."""
HUB_FORM: Final = "hf://owner/name, with /config and ?split=train if it has several"
# A path of a command line has lost the second slash.
_SOURCE: Final = re.compile(r"(?P<scheme>hub:|hf:/+)(?P<name>[^?]*)(?:\?(?P<query>.*))?", re.DOTALL)
_PART: Final = re.compile(r"[\w-][\w.-]*")
_KEYS: Final = ("split", "config")
_DEFAULT_SPLIT: Final = "train"


@dataclass(frozen=True, slots=True)
class TableSelection:
    """The part of a data set to use, and how it is read.

    Attributes:
        split: Name of the split, or a slice such as ``train[:1000]``; None is ``train``.
        config: Name of the configuration (subset); None is the default.
        streaming: Whether the rows are read one after the other into an Arrow file, without downloading all files.
        columns: Pairs of a name that is looked for (``id``, ``image``, ``question``, ``answer``) and the name of the
            column that holds it.
    """

    split: str | None = None
    config: str | None = None
    streaming: bool = False
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def chosen_split(self) -> str:
        """The split, or the one that is used where none is given."""
        return self.split or _DEFAULT_SPLIT


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set on the hub.

    Attributes:
        name: Its name in messages.
        repository: ``owner/name``.
        selection: The part of it.
    """

    name: str
    repository: str
    selection: TableSelection


def is_hub_source(source: str | Path) -> bool:
    """Return whether records are a data set of the hub, and not a path."""
    return _SOURCE.match(str(source)) is not None


def read_hub_source(source: str, selection: TableSelection) -> HubSource:
    """Read the name of a data set on the hub.

    Args:
        source: The name, for which ``is_hub_source``.
        selection: The settings beside the name.

    Raises:
        DataError: It is no such name, or contradicts the settings.
    """
    match = _SOURCE.fullmatch(source)
    scheme, name, query = ("", "", None) if match is None else match.group("scheme", "name", "query")
    scheme = HUB if scheme.startswith("hf:") else scheme
    where = f"{scheme}{name}"
    parts = name.strip("/").split("/")
    if scheme == HUB and len(parts) > 2 and parts[0] == "datasets":  # as the hub's own file system names it
        parts = parts[1:]
    if not 2 <= len(parts) <= 3 or not all(map(_PART.fullmatch, parts)):
        raise DataError.at(source, "is not the name of a data set on the hub", f"write {HUB_FORM}")
    selected = {"config": parts[2]} if len(parts) > 2 else {}
    for pair in (query or "").split("&") if query else ():
        key, _, value = pair.partition("=")
        value = unquote(value)
        if key not in _KEYS or not value:
            what = f"{key[:40]!r} after the question mark is unknown or empty (expected {' or '.join(_KEYS)})"
            raise DataError.at(where, what, f"write {HUB_FORM}")
        _check_same(where, key, selected.setdefault(key, value), value)
    for key, value in selected.items():
        _check_same(where, key, value, getattr(selection, key) or value)
    split, config = selected.get("split", selection.split), selected.get("config", selection.config)
    return HubSource(where, "/".join(parts[:2]), replace(selection, split=split, config=config))


def _check_same(where: str, key: str, named: str, other: str) -> None:
    """Raise ``DataError`` if the name of a source and a setting beside it contradict each other."""
    if named != other:
        raise DataError.at(where, f"names the {key} {named!r}, and {other!r} is set too", "keep one of the two")
