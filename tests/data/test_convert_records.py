"""Records of any form in the released format: they train on the same tokens, and their images keep their bytes."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavar_peft.cli import main
from llavar_peft.data import convert_records as convert_module
from llavar_peft.data.convert_records import convert_records
from llavar_peft.data.encode_record import encode_conversation
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import open_records, parse_record
from llavar_peft.errors import ConfigError, DataError, LlavarError
from llavar_peft.types import EmbeddedImage
from tests.data.test_message_records import PROCESSORS
from tests.data.test_record_tables import png
from tests.serving.server import data_url

TEXT = datasets.Value("string")
QA = {"image": datasets.Image(), "question": TEXT, "answer": TEXT}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _embedded(color: str, path: str | None = None) -> dict[str, Any]:
    return {"bytes": png(color), "path": path}


def _table(path: Path, rows: list[dict[str, Any]], features: dict[str, Any]) -> Path:
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(path)
    return path


Pairs = list[tuple[str, str]]
COLORS = ("red", "blue", "green")


def _as_csv(folder: Path, listed: list[Pairs], images: list[int]) -> Path:
    with (folder / "in.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["image", "question", "answer"])
        rows.writerows([f"{color}.png", *pairs[0]] for pairs, color in zip(listed, images, strict=True))
    return folder / "in.csv"


def _as_cauldron(folder: Path, listed: list[Pairs], images: list[int]) -> Path:
    rows = [
        {"images": [_embedded(COLORS[color]) for color in range(image)],
         "texts": [{"user": question, "assistant": answer} for question, answer in pairs]}
        for pairs, image in zip(listed, images, strict=True)
    ]  # fmt: skip
    features = {"images": datasets.List(datasets.Image()), "texts": datasets.List({"user": TEXT, "assistant": TEXT})}
    return _table(folder / "in.parquet", rows, features)


def _as_messages(folder: Path, listed: list[Pairs], images: list[int]) -> Path:
    records = []
    for number, (pairs, image) in enumerate(zip(listed, images, strict=True)):
        shown = [{"type": "image_url", "image_url": {"url": data_url(png(COLORS[color]))}} for color in range(image)]
        messages = [{"role": "system", "content": pairs[0][1]}] if number % 2 else []
        for turn, (question, answer) in enumerate(pairs):
            messages += [
                {"role": "user", "content": [{"type": "text", "text": question}, *(() if turn else shown)]},
                {"role": "assistant", "content": answer},
            ]  # type: ignore[list-item]
        records.append({"id": f"../{number}", "messages": messages})
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "in.jsonl"


FORMS: dict[str, Callable[[Path, list[Pairs], list[int]], Path]] = {
    "csv": _as_csv, "cauldron": _as_cauldron, "messages": _as_messages,
}  # fmt: skip
WORDS = st.text(st.sampled_from("ab ,;\"'\n<image>é"), min_size=1, max_size=12).filter(str.strip)
ASKED = st.lists(st.lists(st.tuples(WORDS | st.just("Is <image> here?"), WORDS), min_size=1, max_size=3),
                 min_size=1, max_size=4)  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=12)
@given(listed=ASKED, images=st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_converted_records_train_on_the_same_tokens(name: str, listed: list[Pairs], images: list[int]) -> None:
    with TemporaryDirectory() as made:
        folder = Path(made)
        source = open_records(FORMS[name](folder, listed, images[: len(listed)]), folder / "cache")
        before, skipped = [], 0
        for index in range(len(source)):
            try:
                before.append(parse_record(source[index], source.where(index)))
            except DataError:
                skipped += 1  # several images, and another number of <image>
        if not before:
            return
        done = convert_records(source, folder / "out.json", skip_faulty=True)
        assert (done.records, done.left_out) == (len(before), skipped)
        after = open_records(folder / "out.json")
        for index, expected in enumerate(before):
            raw = after[index]
            assert set(raw) <= {"id", "image", "conversations" if "messages" not in raw else "messages"}
            found = parse_record(raw, after.where(index))
            for processor in PROCESSORS.values():
                ours, theirs = (encode_conversation(one, processor, 9999) for one in (found, expected))
                assert ours.input_ids.tolist() == theirs.input_ids.tolist()
                assert ours.labels.tolist() == theirs.labels.tolist()
                assert len(ours.images) == len(theirs.images)
            for one, other in zip(found.images, expected.images, strict=True):
                if isinstance(other, EmbeddedImage):
                    assert (folder / "out_images" / str(one)).read_bytes() == bytes(other.data)
                else:
                    assert one == other
        names = [path.name for path in (folder / "out_images").glob("[!.]*")]
        assert len(names) == done.files <= 3


NAMED = {
    "scans/Total.PNG": "Total.png", "a/total.jpg": "total-2.png", "../../etc/passwd": "passwd.png",
    "C:\\scans\\été 1.tiff": "été_1.png", "con.png": "image-con.png", "..": "image.png", ".hidden": "hidden.png",
    "x" * 70: "x" * 70 + ".png", None: "7.png",
}  # fmt: skip


def test_names_of_files_are_safe_and_never_collide(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": png("red", side), "path": name}, "question": "?", "answer": "a"}
        for side, name in enumerate(NAMED, 8)
    ]
    rows[-1]["id"] = "7"
    rows += rows[:2]
    done = convert_records(open_records(rows), tmp_path / "out.jsonl", tmp_path / "made")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = [line["image"] for line in lines]
    assert found[: len(NAMED)] == [*list(NAMED.values())[:5], "image-.png", *list(NAMED.values())[6:]]
    assert found[len(NAMED) :] == found[:2]
    assert done.files == len(NAMED) == len({name.casefold() for name in found})
    assert len(list((tmp_path / "made").glob("[!.]*"))) == done.files
    roots = ImageRoots([tmp_path / "made"])
    assert [roots.open(name).width for name in found[: len(NAMED)]] == list(range(8, 8 + len(NAMED)))


def test_rows_of_one_image_become_turns_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text(
        "image,question,answer\na.png,Total?,5\nb.png,Who?,Ann\na.png,Date?,May\n,Hi,Yes\n,Hi,No\n"
    )
    source, out = str(tmp_path / "a.csv"), tmp_path / "out.json"
    assert main(["data", "convert", source, "--out", str(out)]) == 0
    assert [len(record["conversations"]) for record in json.loads(out.read_text())] == [2] * 5
    assert main(["data", "convert", source, "--out", str(out), "--group-by-image"]) == 2
    assert "exists already. Fix: choose another file, or add --overwrite" in capsys.readouterr().err
    assert main(["data", "convert", source, "--out", str(out), "--group-by-image", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "records": 4, "grouped": 1, "messages": 0, "left_out": 0, "images": None, "files": 0, "out": str(out),
    }  # fmt: skip
    first = json.loads(out.read_text())[0]
    texts = [turn["value"].replace("<image>", "").strip() for turn in first["conversations"]]
    assert texts == ["Total?", "5", "Date?", "May"]
    assert sum(turn["value"].count("<image>") for turn in first["conversations"]) == 1


def test_nothing_is_written_where_records_are_faulty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"image": _embedded("red", "a.png"), "question": "?", "answer": "a"}
    rows = [good, {**good, "image": {"bytes": b"<html>", "path": "b.png"}}, {**good, "question": None}]
    source, out = _table(tmp_path / "in.parquet", rows, QA), tmp_path / "out.json"
    assert main(["data", "convert", str(source), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"2 faults, nothing was written\n{source}:1: image (b.png): is a web page" in said
    assert f"\n{source}:2: 'question' is empty" in said
    assert "--skip-faulty" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet"]
    assert main(["data", "convert", str(source), "--out", str(out), "--skip-faulty"]) == 0
    assert "2 records left out" in capsys.readouterr().out
    assert main(["data", "check", str(out), "--images", str(tmp_path / "out_images")]) == 0


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": _embedded(color), "question": "?", "answer": "a", "text_height": 9} for color in COLORS]
    real = os.fsync

    def stop(handle: int) -> None:
        raise KeyboardInterrupt

    for place in ("fsync", "commit"):
        if place == "fsync":
            monkeypatch.setattr(os, "fsync", stop)
        else:
            monkeypatch.setattr(os, "fsync", real)
            monkeypatch.setattr(convert_module, "commit_folder", lambda *_: stop(0))
        with pytest.raises(KeyboardInterrupt):
            convert_records(open_records(rows), tmp_path / "out.json")
        assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / ".out_images.part").mkdir()  # of a process that was ended
    (tmp_path / ".out_images.part/old.png").touch()
    assert convert_records(open_records(rows), tmp_path / "out.json").files == 3
    assert len(list((tmp_path / "out_images").glob("[!.]*"))) == 3
    assert [record["text_height"] for record in json.loads((tmp_path / "out.json").read_text())] == [9] * 3
    again = convert_records(open_records(rows[:1]), tmp_path / "out.json", overwrite=True)
    assert (again.records, len(list((tmp_path / "out_images").glob("[!.]*")))) == (1, 1)


def test_folders_and_files_of_others_are_kept(tmp_path: Path) -> None:
    rows = [{"image": _embedded("red"), "question": "?", "answer": "a"}]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").touch()
    (tmp_path / "file").touch()
    cases: tuple[tuple[str, str, str], ...] = (
        ("out.json", "mine", "is not empty, and the records contain images"),
        ("out.json", "file", "is a file, expected a folder"), ("mine/out.json", "mine", "would contain out.json"),
        ("out.csv", "new", r"end the name in \.json or \.jsonl"), ("mine", "new", "is a folder, expected a file"),
    )  # fmt: skip
    for out, images, message in cases:
        with pytest.raises(ConfigError, match=message):
            convert_records(open_records(rows), tmp_path / out, tmp_path / images, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.png"]
    convert_records(open_records(rows), tmp_path / "out.json", tmp_path / "new")
    with pytest.raises(LlavarError, match="exists already"):
        convert_records(open_records(rows), tmp_path / "two.json", tmp_path / "new")
