"""Records in the formats of others are named for what they are, in the same words by every command."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavar_peft.cli import main
from llavar_peft.data.check_records import check_records, preflight
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import open_records
from llavar_peft.errors import DataError

TURNS = [{"from": "human", "value": "<image>\nRead it."}, {"from": "gpt", "value": "EXIT"}]
BROKEN_URL = "data:image/png;base64," + "@" * 80_000


def record(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "image": "a.png", "conversations": TURNS, **changes}


FOREIGN: dict[str, tuple[dict[str, Any], str, str]] = {
    "data URL": (record(image=BROKEN_URL), "is a data URL that is not valid base64", "save the image"),
    "text as data URL": (record(image="data:image/svg+xml;utf8,<svg/>"), "a data URL without base64", "save the image"),
    "long text": (record(image=base64.b64encode(bytes(9000)).decode()), "too long for a path", "save the image"),
    "URL": (record(image="https://example.org/a.png?size=big"), "is a URL (got 'https://example.org", "download it"),
    "bucket": (record(image="s3://bucket/a.png"), "is a URL (got 's3://bucket/a.png'", "download it"),
    "embedded": (record(image={"bytes": "iVBORw0", "path": None}), "whose bytes are a string", "save the image"),
    "list of URLs": (record(image=["http://x/a.png"]), "is a URL", "download it"),
    "video": (record(image=None, video="a.mp4"), "names a video", "save frames as images"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_record_is_named_alike_before_training_and_by_the_check(name: str, tmp_path: Path) -> None:
    raw, what, fix = FOREIGN[name]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([raw]))
    roots = ImageRoots([tmp_path])
    for findings in (check_records(open_records(path), roots).faults, preflight(open_records(path), roots)):
        assert findings
        for finding in findings:
            assert what in finding.what
            assert fix in finding.fix
            assert len(str(finding)) < 400 + len(str(path))
            assert "\n" not in str(finding)


@pytest.mark.parametrize("name", ["r.xls", "r.xlsx", "r.ods"])
def test_spreadsheets_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(DataError, match=r"is a spreadsheet \(\.\w+\), .*save it as CSV in UTF-8"):
        open_records(tmp_path / name)


def test_paths_with_colons_and_long_names_are_paths(tmp_path: Path) -> None:
    (tmp_path / "scan:1").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "scan:1/a.png")
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(image="scan:1/a.png")]))
    assert preflight(open_records(path), ImageRoots([tmp_path])) == []
    assert check_records(open_records(path), ImageRoots([tmp_path])).clean


@pytest.mark.parametrize("content", ["[]", " [ ] "])
def test_no_records_are_an_error_of_the_check_as_of_training(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("r.json", content), ("r.jsonl", "\n")):
        (tmp_path / name).write_text(text)
        assert main(["data", "check", str(tmp_path / name)]) == 2
        assert "no records" in capsys.readouterr().err
