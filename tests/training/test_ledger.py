"""A record that cannot be trained on is counted once, and the policy applies to a second run as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavar_peft import DataConfig
from llavar_peft.errors import DataError
from llavar_peft.training.dropped_records import DroppedRecords

IMAGE = ("a", "image: a.png: broken")


def _dropped(path: Path, **settings: object) -> DroppedRecords:
    return DroppedRecords(path / "dropped.jsonl", DataConfig(records="r.json", **settings), total=100)  # type: ignore[arg-type]


def test_a_bad_image_stops_each_run_until_it_is_repaired(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.png: broken"):
            _dropped(tmp_path).add([IMAGE])


def test_records_count_once_over_epochs_and_runs(tmp_path: Path) -> None:
    for _ in range(3):
        dropped = _dropped(tmp_path, on_bad_image="skip")
        dropped.add([IMAGE])
        dropped.add([IMAGE])
    assert (tmp_path / "dropped.jsonl").read_text().count("\n") == 1


def test_above_the_share_each_run_stops_and_names_them(tmp_path: Path) -> None:
    faults = [IMAGE, ("b", "labels: truncated_before_answer")]
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of 100 records .* Records a, b"):
            _dropped(tmp_path, on_bad_image="skip").add(faults)
