"""Building records from a folder: what is kept, what the report says, and that a killed run is resumed."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest
from PIL import Image

from llavar_peft.cli import main
from llavar_peft.constants import OCR_INSTRUCTIONS
from llavar_peft.data.check_records import check_records
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import open_records
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr.build_ocr_records import BuildSettings, build_records, journal_path, report_path
from llavar_peft.datagen.ocr.ocr_quality import QualityLimits
from llavar_peft.datagen.ocr.read_image_folder import ReadingSettings, bring_short_edge, read_images
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.errors import DataError, EnvironmentFaultError, ImageError
from llavar_peft.evaluation.vqa.scored_results import read_results
from tests.commands import python

pytest.importorskip("rapidocr")
pytest.importorskip("onnxruntime")

ALONE = BuildSettings(workers=1)


@pytest.fixture(scope="module")
def built(signs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the records of the folder, read by two processes."""
    out = tmp_path_factory.mktemp("built") / "records.json"
    build_records(signs, out, BuildSettings(workers=2))
    return out


@pytest.mark.slow
def test_good_images_are_kept_and_the_others_reported(signs: Path, built: Path) -> None:
    records = json.loads(built.read_text("utf-8"))
    report = json.loads(report_path(built).read_text("utf-8"))
    assert [record["image"] for record in records] == [
        "more/signs_000000.png",
        *(f"signs_00000{number}.png" for number in (0, 2, 3, 4)),
    ]
    assert [record["id"] for record in records][:2] == ["more/signs_000000", "signs_000000"]
    assert {drop["path"]: drop["reason"] for drop in report["drops"]} == {
        "blank.png": "blank_page",
        "broken.png": "broken_image",
        "copy.jpg": "duplicate",
    }
    assert (report["images"], report["kept"], report["other_files"]) == (8, 5, 1)
    assert report["drops"][2]["detail"] == "of signs_000002.png"
    assert check_records(open_records(built), ImageRoots(signs)).clean


def test_records_are_in_the_released_format(built: Path) -> None:
    for record in json.loads(built.read_text("utf-8")):
        assert list(record)[:3] == ["id", "image", "conversations"]
        assert 10 < record["text_height"] < record["image_height"] / 2  # signs
        asked, answered = record["conversations"]
        assert (asked["from"], answered["from"]) == ("human", "gpt")
        question = asked["value"].removeprefix("<image>\n").removesuffix("\n<image>")
        assert question in OCR_INSTRUCTIONS
        assert asked["value"] in (f"<image>\n{question}", f"{question}\n<image>")
        assert answered["value"]


def test_a_benchmark_takes_the_letter_height_from_an_ocr_build(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(built.read_text("utf-8"))
    asked = {"question": "What does it say?", "answers": ["A"], "prediction": "A"}
    rows = [{"question_id": record["id"], "image": record["image"], **asked} for record in records]
    rows.append({"question_id": "other", "image": "other.png", **asked})
    rows[0] |= {"text_height": 10, "image_width": 336, "image_height": 100}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = ["eval", "vqa", "--predictions", str(tmp_path / "rows.json"), "--out", str(tmp_path / "results.json")]
    assert main(command) == 0
    assert main(["eval", "diagnose", str(tmp_path / "results.json")]) == 0
    assert "of 1 records with known letter height" in capsys.readouterr().out
    assert main([*command, "--heights", str(built)]) == 0
    heights = {one.id: one.letter_height for one in read_results(tmp_path / "results.json").records}
    assert heights.pop("other") is None
    assert heights.pop(records[0]["id"]) == 10  # stated by the data set
    assert heights == {
        one["id"]: pytest.approx(one["text_height"] * 336 / max(one["image_width"], one["image_height"]))
        for one in records[1:]
    }
    (tmp_path / "rows.json").write_text(json.dumps(rows[-1:]))
    assert main(command) == 0
    assert main(["eval", "diagnose", str(tmp_path / "results.json")]) == 0
    assert "eval vqa --heights" in capsys.readouterr().out
    assert main([*command, "--heights", str(built)]) == 2
    assert "holds none of the images of the questions" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tesseract") is None, reason="the program tesseract is not installed")
def test_two_engines_keep_what_both_read(tmp_path: Path) -> None:
    """RapidOCR reads a page that is upside down, Tesseract does not."""
    images = write_synthetic(tmp_path, 1, SynthSettings(kinds=("covers",), width=420, seed=4)).images
    with Image.open(images / "covers_000000.png") as cover:
        cover.rotate(180).save(images / "turned.png")
    alone = ["--workers", "1", "--keep-duplicates"]
    assert main(["ocr", "build", str(images), "--out", str(tmp_path / "both.json"), "--both", *alone]) == 0
    (record,) = json.loads((tmp_path / "both.json").read_text("utf-8"))
    truth = json.loads((tmp_path / "truth.jsonl").read_text("utf-8"))
    assert record["image"] == truth["image"]
    assert record["conversations"][1]["value"].split() == truth["text"].split()
    report = json.loads((tmp_path / "both.report.json").read_text("utf-8"))
    assert set(report["reading"]["engines"]) == {"rapidocr", "tesseract"}
    assert [(drop["path"], drop["reason"]) for drop in report["drops"]] == [("turned.png", "engines_disagree")]
    # Other limits read nothing again: with any disagreement allowed, RapidOCR's reading becomes a record.
    shutil.copy(journal_path(tmp_path / "both.json"), journal_path(tmp_path / "any.json"))
    more = ["--both", *alone, "--max-disagreement", "1"]
    assert main(["ocr", "build", str(images), "--out", str(tmp_path / "any.json"), *more]) == 0
    _, turned = json.loads((tmp_path / "any.json").read_text("utf-8"))
    assert set(turned["conversations"][1]["value"].split()) == set(truth["text"].split())


def test_other_limits_read_nothing_again(signs: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    shutil.copy(journal_path(built), journal_path(out))
    report = build_records(signs, out, replace(ALONE, limits=QualityLimits(min_letters=1), keep_duplicates=True))
    assert (report.resumed, report.kept) == (report.images, 6)


@pytest.mark.slow
def test_an_incomplete_journal_is_resumed(signs: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    journal_path(out).write_bytes(journal_path(built).read_bytes()[:-300])
    report = build_records(signs, out, ALONE)
    assert 0 < report.resumed < report.images
    assert out.read_bytes() == built.read_bytes()
    again = build_records(signs, out, ALONE)
    assert again.resumed == again.images
    assert out.read_bytes() == built.read_bytes()


@pytest.mark.slow
def test_a_changed_image_is_read_again(signs: Path, built: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "records.json"
    shutil.copytree(signs, images)
    shutil.copy(journal_path(built), journal_path(out))
    shutil.copy(images / "signs_000004.png", images / "signs_000000.png")
    report = build_records(images, out, ALONE)
    assert report.resumed == report.images - 1
    assert {drop.path for drop in report.drops if drop.reason == "duplicate"} == {"copy.jpg", "signs_000004.png"}


def test_other_settings_are_rejected(signs: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    shutil.copy(journal_path(built), journal_path(out))
    with pytest.raises(DataError, match="profile was 'auto' and is 'paper'"):
        build_records(signs, out, replace(ALONE, reading=ReadingSettings(profile="paper")))


def test_a_broken_image_can_stop_the_build(signs: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    stop = replace(ALONE, on_bad_image="stop")
    for _ in range(2):
        with pytest.raises(ImageError, match=r"broken\.png: cannot be read"):
            build_records(signs, out, stop)
        assert not out.exists()


_KILLED = """
import os, signal
from llavar_peft.cli import main
from llavar_peft.data.resume_journal import ResumeJournal
plain, calls = ResumeJournal.append, 0

def append(*given):
    global calls
    plain(*given)
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)

ResumeJournal.append = append
main(["ocr", "build", {images!r}, "--out", {out!r}, "--workers", "1"])
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed(signs: Path, built: Path, tmp_path: Path) -> None:
    """Killed after the journal's heading and two images."""
    out = tmp_path / "records.json"
    assert python(_KILLED.format(images=str(signs), out=str(out)), tmp_path).status == -signal.SIGKILL
    assert not out.exists()
    report = build_records(signs, out, ALONE)
    assert report.resumed == 2
    assert out.read_bytes() == built.read_bytes()


def test_the_command_and_its_page(signs: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.json"
    shutil.copy(journal_path(built), journal_path(out))
    assert main(["ocr", "build", str(signs), "--out", str(out), "--script", "latin"]) == 0
    output = capsys.readouterr().out
    assert "records                     5" in output
    assert "cannot be opened" in output
    page = (tmp_path / "records.report.html").read_text("utf-8")
    assert page.count("<article>") == 8
    assert "http" not in page.replace("http-equiv", "")
    assert main(["data", "check", str(out), "--images", str(signs)]) == 0


def test_a_build_without_records_is_an_error(signs: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    shutil.copy(journal_path(built), journal_path(out))
    with pytest.raises(DataError, match="no image became a record"):
        build_records(signs, out, replace(ALONE, limits=QualityLimits(script="CYRILLIC")))
    with pytest.raises(ImageError, match="is not a folder"):
        build_records(tmp_path / "nowhere", out, ALONE)


def test_two_simultaneous_runs_are_rejected(tmp_path: Path) -> None:
    with ResumeJournal(tmp_path / "j.jsonl", {"a": 1}) as journal:
        journal.append({"b": "ü"})
        with pytest.raises(EnvironmentFaultError, match="another process"):
            ResumeJournal(tmp_path / "j.jsonl", {"a": 1})
    with ResumeJournal(tmp_path / "j.jsonl", {"a": 1}) as journal:
        assert [entry for _, entry in journal.entries()] == [{"b": "ü"}]


@pytest.mark.parametrize(
    ("size", "expected"), [((768, 1000), (384, 500)), ((100, 50), (768, 384)), ((384, 900), (384, 900))]
)
def test_the_short_edge(size: tuple[int, int], expected: tuple[int, int]) -> None:
    from PIL import Image

    scaled, factor = bring_short_edge(Image.new("RGB", size), 384)
    assert scaled.size == expected
    assert factor == pytest.approx(expected[0] / size[0])
    strip, _ = bring_short_edge(Image.new("RGB", (600, 1)), 384)
    assert strip.size == (4096, 7)


@pytest.mark.parametrize(("images", "processes"), [(4, 0), (5, 2)])
def test_no_process_starts_for_fewer_than_four_images(images: int, processes: int, tmp_path: Path) -> None:
    paths = [f"{number}.png" for number in range(images)]
    for path in paths:
        (tmp_path / path).write_bytes(b"no image")
    started: set[int] = set()
    with ResumeJournal(tmp_path / "journal.jsonl", {}) as journal:
        read_images(tmp_path, paths, ReadingSettings(), journal, 8, lambda entry: started.add(len(active_children())))
    assert max(started) == processes
