"""``check_records`` and ``preflight`` find every fault and name its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavar_peft.data import image_roots
from llavar_peft.data.check_records import check_records, preflight
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import RecordStore, open_records


def record(identity: Any, image: Any = "a.png", *texts: str) -> dict[str, Any]:
    turns = [
        {"from": "gpt" if number % 2 else "human", "value": text}
        for number, text in enumerate(texts or ("<image>\nRead it.", "EXIT"))
    ]
    return {"id": identity, "image": image, "conversations": turns}


@pytest.fixture
def roots(tmp_path: Path) -> ImageRoots:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.new("RGB", (5, 4)).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:45])
    (tmp_path / "secret.png").write_bytes((folder / "a.png").read_bytes())
    return ImageRoots(folder)


def store(tmp_path: Path, records: list[Any]) -> RecordStore:
    path = tmp_path / "r.jsonl"
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in records))
    return open_records(path)


VALID = [
    record(0),
    record(1, "sub/c.png"),
    record(2, None, "Hi", "Hello"),
    record(3, ["a.png"] * 2, "<image><image>", "x"),
]
# (record, kinds of its faults, a part of the message)
FAULTY: list[tuple[Any, list[str], str]] = [
    ('{"id": 4,', ["record"], "not valid JSON"),
    ({"id": 5, "conversations": []}, ["record"], "no turn from 'human'"),
    (record([], 7), ["record", "record"], "expected a relative path"),
    (record(7, "a.png", "Read it.", "EXIT"), ["placeholder"], "never sees the image"),
    (record(8, None, "<image>", "EXIT"), ["placeholder"], "names no image"),
    (record(9, "a.png", "<image>", " "), ["empty_answer"], "1 of 1 answers is empty"),
    (record(10, "a.png", "<image>", "b", "c"), ["last_turn"], "has no answer"),
    (record(11, "a.png", "<image>"), ["no_answer"], "no turn from 'gpt' to learn from"),
    (record(12, "A.png"), ["image_missing"], "if a.png is meant"),
    (record(13, ["a.png", "none/x.png"], "<image><image>", "x"), ["image_missing"], "none/x.png: is in none of"),
    (record(14, "../secret.png"), ["image_outside"], "leads outside"),
    (record(15, "/etc/passwd"), ["image_outside"], "leads outside"),
    (record(16, "broken.png"), ["image_broken"], "cannot be read as an image"),
    (record(17, "broken.png", "<image>", ""), ["empty_answer", "image_broken"], "broken.png"),
]


def test_valid_records_have_no_faults(tmp_path: Path, roots: ImageRoots) -> None:
    report = check_records(store(tmp_path, VALID), roots)
    assert (report.clean, len(report), report.records, report.images_opened) == (True, 0, 4, 2)
    assert preflight(store(tmp_path, VALID), roots) == []


def test_every_fault_is_listed_with_its_record(tmp_path: Path, roots: ImageRoots) -> None:
    records = store(tmp_path, VALID + [faulty for faulty, _, _ in FAULTY])
    calls: list[tuple[int, int]] = []
    report = check_records(records, roots, workers=2, progress=lambda done, total: calls.append((done, total)))
    assert not report.clean
    for index, (_, kinds, what) in enumerate(FAULTY, start=len(VALID)):
        found = [finding for finding in report if finding.index == index]
        assert sorted(finding.kind for finding in found) == sorted(kinds)
        assert any(what in str(finding) for finding in found), found
        assert all(finding.where.startswith(records.where(index)) and finding.fix for finding in found)
    assert [finding.index for finding in report] == sorted(finding.index for finding in report)
    assert sum(report.counts.values()) == len(report)
    assert (report.counts["placeholder"], report.counts["image_broken"]) == (2, 2)
    assert calls == [(len(records), len(records))]
    assert json.loads(json.dumps(report.as_dict()))["faults"][0]["where"] == records.where(4)


def test_missing_images_are_found_without_opening_any(tmp_path: Path, roots: ImageRoots) -> None:
    report = check_records(store(tmp_path, [record(0, "broken.png"), record(1, "b.jpg")]), roots, open_images=False)
    assert [finding.kind for finding in report] == ["image_missing"]
    assert report.images_opened == 0


def test_preflight_finds_the_records_that_would_stop_a_run(tmp_path: Path, roots: ImageRoots) -> None:
    records = store(tmp_path, VALID + [faulty for faulty, _, _ in FAULTY])
    expected = [
        (index, kind)
        for index, (_, kinds, _) in enumerate(FAULTY, start=len(VALID))
        for kind in kinds
        if kind != "image_broken"  # only opening the image can tell
    ]
    found = preflight(records, roots)
    assert [(fault.index, fault.kind) for fault in found] == expected
    assert all(fault.where.startswith(records.where(fault.index)) for fault in found)


@pytest.mark.parametrize("listed_after", [0, 1, 64])
def test_listing_folders_gives_the_same_result_as_single_lookups(
    listed_after: int, tmp_path: Path, roots: ImageRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = roots.roots[0]
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "in.png").symlink_to(folder / "b.png")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "dir.png").mkdir()
    names = ["a.png", "sub/c.png", "in.png", "none.png", "out.png", "outside/secret.png", "dir.png", "sub", "./b.png"]
    monkeypatch.setattr(image_roots, "_LISTED_AFTER", listed_after)
    records = store(tmp_path, [record(index, name) for index, name in enumerate(names * 2)])
    bad = [3, 4, 5, 6, 7]
    assert [fault.index for fault in preflight(records, roots)] == bad + [index + len(names) for index in bad]


def test_missing_image_folders_are_reported_once(tmp_path: Path) -> None:
    report = check_records(store(tmp_path, VALID), ImageRoots())
    assert [finding.kind for finding in report] == ["no_image_folder"]
    assert "the records name 2 images" in str(report[0])
    assert check_records(store(tmp_path, [VALID[2]]), ImageRoots()).clean


def test_repeated_ids_are_a_warning(tmp_path: Path, roots: ImageRoots) -> None:
    records = store(tmp_path, [record(name) for name in "abacaaa"])
    report = check_records(records, roots)
    assert report.clean
    assert [finding.kind for finding in report.warnings] == ["duplicate_id"]
    where = records.where
    expected = f"{where(0)}: the id 'a' is used again by {where(2)}, {where(4)}, {where(5)} and 1 more."
    assert str(report.warnings[0]).startswith(expected)
    no_ids = [{key: value for key, value in record(0).items() if key != "id"}] * 2
    assert not check_records(RecordStore([*open_records(no_ids).parts] * 2), roots).warnings


def test_an_image_placeholder_in_an_answer_is_a_warning(tmp_path: Path, roots: ImageRoots) -> None:
    answered = record(0, "a.png", "<image>\nRead it.", "![figure](<image>) EXIT")
    report = check_records(store(tmp_path, [*VALID, answered]), roots)
    assert report.clean
    (warning,) = report.warnings
    assert (warning.kind, warning.index) == ("placeholder_in_answer", len(VALID))
    only = record(0, "a.png", "Read it.", "<image>")
    assert [finding.kind for finding in check_records(store(tmp_path, [only]), roots)] == ["placeholder"]


def test_an_absolute_path_into_an_image_folder_is_inside_it(tmp_path: Path, roots: ImageRoots) -> None:
    inside, outside = str(roots.roots[0] / "a.png"), str(tmp_path / "secret.png")
    (roots.roots[0] / "linked.png").symlink_to(tmp_path / "secret.png")
    linked = str(roots.roots[0] / "linked.png")
    records = store(tmp_path, [record(0, inside), record(1, outside), record(2, linked)])
    assert [(found.index, found.kind) for found in check_records(records, roots)] == [
        (1, "image_outside"), (2, "image_outside"),
    ]  # fmt: skip
    assert roots.open(inside).size == (5, 4)
