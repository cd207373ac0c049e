"""What a file of answers says of how they were got, held to what its reader says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from llavar_peft.errors import ConfigError
from llavar_peft.evaluation.vqa.benchmark_files import LOG_HEADER
from llavar_peft.evaluation.vqa.scored_results import Setting


def read_setting(path: Path) -> Setting:
    """Find how answers were got: in the head of those that ``eval vqa`` keeps, or in the original's ``metadata``.

    Args:
        path: A file of answers. One that cannot be read says nothing here; whoever reads the answers will complain.

    Returns:
        What the file says, None for what it does not, or not of all its answers.
    """
    if path.suffix.lower() != ".jsonl":
        return Setting()
    said: dict[str, Any] | None = None
    try:
        for line in path.read_text(encoding="utf-8-sig").split("\n"):
            row = json.loads(line) if line.strip() else None
            if isinstance(row, dict) and set(row) == LOG_HEADER:
                return Setting(**_known(row["setting"]))
            if row is not None:
                own = read_stated_settings(row)
                said = own if said is None else {key: value for key, value in said.items() if own.get(key) == value}
    except (OSError, ValueError):
        return Setting()
    return Setting(**(said or {}))


def read_stated_settings(row: Any) -> dict[str, Any]:
    """What one answer in the original's form says of how it was got: its ``model_id`` and ``metadata``.

    Args:
        row: A line of a file of answers.

    Returns:
        Values of ``Setting`` by name.
    """
    if not isinstance(row, Mapping):
        return {}
    model = {} if row.get("model_id") is None else {"model": str(row["model_id"])}
    return {**model, **_known(row.get("metadata"))}


def write_stated_settings(found: Setting, told: Setting, where: str) -> Setting:
    """Put together what a file of answers says and what its user says.

    Args:
        found: The file's.
        told: The user's.
        where: The file, in messages.

    Returns:
        Both.

    Raises:
        ConfigError: They contradict each other.
    """
    said = {key: value for key, value in asdict(told).items() if value is not None}
    for key, value in said.items():
        own = getattr(found, key)
        if own is not None and own != value:
            raise ConfigError.at(
                f"--{key.replace('_', '-')}",
                f"contradicts {where}, whose answers were got otherwise (got {value!r}, there {own!r})",
                "leave the option out",
            )
    return replace(found, **said)


def _known(said: Any) -> dict[str, Any]:
    names = {entry.name for entry in fields(Setting)}
    plain = said if isinstance(said, Mapping) else {}
    return {key: value for key, value in plain.items() if key in names and isinstance(value, str | int | float)}
