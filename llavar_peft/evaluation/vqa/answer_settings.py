"""How answers were generated: read from the file that holds them, and completed by the user's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from llavar_peft.errors import DAMAGED, ConfigError
from llavar_peft.evaluation.vqa.benchmark_files import LOG_HEADER
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.text_files import read_json_lines


def read_setting(path: Path) -> Setting:
    """Read how answers were generated, from the header of ``eval vqa``'s log or the original's ``metadata``.

    Args:
        path: A file of answers. If it cannot be read, the result is empty; reading the answers reports the error.

    Returns:
        The setting; None for values that the file lacks or that differ between its answers.
    """
    if path.suffix.lower() != ".jsonl":
        return Setting()
    common: dict[str, Any] | None = None
    try:
        for _, row in read_json_lines(path, lenient=True):
            if isinstance(row, dict) and set(row) == LOG_HEADER:
                return Setting(**_select_known(row["setting"]))
            if row is not None:
                own = read_stated_settings(row)
                common = (
                    own if common is None else {key: value for key, value in common.items() if own.get(key) == value}
                )
    except DAMAGED:
        return Setting()
    return Setting(**(common or {}))


def read_stated_settings(row: Any) -> dict[str, Any]:
    """Read the ``model_id`` and ``metadata`` of one answer in the original's format, as fields of ``Setting``."""
    if not isinstance(row, Mapping):
        return {}
    model = {} if row.get("model_id") is None else {"model": str(row["model_id"])}
    return {**model, **_select_known(row.get("metadata"))}


def merge_settings(found: Setting, given: Setting, where: str) -> Setting:
    """Complete the setting of a file of answers by the user's.

    Args:
        found: The setting that the file gives.
        given: The setting that the user gives.
        where: The file, for messages.

    Raises:
        ConfigError: They contradict each other.
    """
    values = {key: value for key, value in asdict(given).items() if value is not None}
    for key, value in values.items():
        own = getattr(found, key)
        if own is not None and own != value:
            raise ConfigError.at(
                f"--{key.replace('_', '-')}",
                f"contradicts {where} (got {value!r}, the file has {own!r})",
                "leave out the option",
            )
    return replace(found, **values)


def _select_known(values: Any) -> dict[str, Any]:
    names = {entry.name for entry in fields(Setting)}
    mapping = values if isinstance(values, Mapping) else {}
    return {key: value for key, value in mapping.items() if key in names and isinstance(value, str | int | float)}
