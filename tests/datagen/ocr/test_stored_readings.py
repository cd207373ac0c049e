"""Readings that were edited or damaged are named; ``ocr build`` and ``ocr converse`` read them in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavar_peft.datagen.ocr.make_conversations import ConverseSettings, make_conversations
from llavar_peft.datagen.ocr.stored_readings import stored_readings
from llavar_peft.datagen.openai_client import Endpoint
from llavar_peft.errors import DataError

LINE = ["STOP", [0.0, 0.0, 9.0, 0.0, 9.0, 5.0, 0.0, 5.0], 0.9]
ENTRY = {"path": "a.png", "size": 1, "mtime_ns": 2, "width": 9, "height": 5, "hash": "0f", "blank": False}


def _write(folder: Path, **changes: Any) -> Path:
    entry = {**ENTRY, "lines": {"rapidocr": [LINE]}, **changes}
    path = folder / "records.ocr.jsonl"
    path.write_text(json.dumps({"format": 2}) + "\n" + json.dumps(entry) + "\n")
    (folder / "records.json").write_text("[]")
    return path


def test_valid_readings_are_read(tmp_path: Path) -> None:
    path = _write(tmp_path)
    assert [entry["path"] for _, entry in stored_readings(path, ["rapidocr"])] == ["a.png"]
    path = _write(tmp_path, lines=None, error="broken", reason="broken_image")
    assert [entry["error"] for _, entry in stored_readings(path)] == ["broken"]


@pytest.mark.parametrize(
    "changes",
    [
        {"path": 5}, {"lines": 7}, {"lines": {"rapidocr": [["STOP", [0.0], 0.9]]}}, {"lines": {}}, {"hash": "xyz"},
        {"lines": {"rapidocr": [["STOP", 0.5, 0.9]]}}, {"width": "9"}, {"lines": None}, {"hash": "f" * 99},
        {"lines": {"rapidocr": [["STOP", [float("nan")] * 8, 0.9]]}}, {"error": "x", "reason": "other"},
    ],
)  # fmt: skip
def test_damaged_readings_are_named(changes: dict[str, Any], tmp_path: Path) -> None:
    path = _write(tmp_path, **changes)
    with pytest.raises(DataError, match=r"records\.ocr\.jsonl: holds an entry that is no reading"):
        list(stored_readings(path, ["rapidocr"]))
    if changes != {"lines": {}}:
        settings = ConverseSettings(endpoint=Endpoint(model="m", base_url="http://127.0.0.1:9/v1"))
        with pytest.raises(DataError, match="no reading of an image"):
            make_conversations(tmp_path / "records.json", tmp_path / "out.json", settings)
