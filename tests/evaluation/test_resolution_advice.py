"""``data check`` and ``eval diagnose`` name the cheapest resolution at which the text of records can be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavar_peft import cli
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr import read_line_heights
from llavar_peft.datagen.ocr.ocr_lines import OcrLine
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.errors import MissingDependencyError
from llavar_peft.evaluation.vqa.diagnose_results import measure_letter_height
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.models.build_model import load_processor
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.resolution import Tiles, describe_resolution


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of small print, with the height of their letters, and a conversation without an image."""
    folder = tmp_path_factory.mktemp("small-print")
    write_synthetic(folder, 6, SynthSettings(kinds=("documents",), width=900, seed=5), workers=1)
    records = json.loads((folder / "records.json").read_text())
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    (folder / "records.json").write_text(json.dumps([*records, {"id": "talk", "conversations": turns}]))
    return folder


@pytest.fixture
def unmeasured(tmp_path: Path) -> Path:
    """Four records that do not say how high their letters are, with images of 672 x 672 pixels."""
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "Read it.\n<image>"}, {"from": "gpt", "value": "EXIT"}]
    for number in range(4):
        Image.new("RGB", (672, 672), "white").save(tmp_path / "images" / f"{number}.png")
    rows = [{"id": str(number), "image": f"{number}.png", "conversations": turns} for number in range(4)]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    return tmp_path


def check(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    given = ["data", "check", str(folder / "records.json"), "--images", str(folder / "images")]
    assert cli.main([*given, *more]) == 0
    return capsys.readouterr().out


def a_line(top: float, height: float, letters: int = 10) -> OcrLine:
    corners = ((0.0, top), (100.0, top), (100.0, top + height), (0.0, top + height))
    return OcrLine("x" * letters, corners, 0.9)


class Engine:
    """An engine that reads one large line and nine small ones in each image, and counts the images."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def read(self, image: Image.Image) -> Sequence[OcrLine]:
        self.sizes.append(image.size)
        return (a_line(0, 40), *(a_line(50 + 20 * number, 10) for number in range(9)))


def test_synthetic_records_are_checked(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(check(drawn, capsys, "--json"))["resolutions"]
    records = [record for record in json.loads((drawn / "records.json").read_text()) if "image" in record]
    heights = [record["text_height"] * 336 / max(record["image_width"], record["image_height"]) for record in records]
    assert (found["records"], found["drawn"], found["side"]) == (6, 6, 336)
    assert found["settings"][0]["share_below"] == pytest.approx(sum(height < 7 for height in heights) / 6)
    assert found["settings"][0]["share_below"] == 1
    assert found["reached"]
    best, *_ = found["recommended"]
    enough = [one for one in found["settings"] if one["share_below"] <= 0.05]
    assert best["image_tokens"] == min(one["image_tokens"] for one in enough)
    said = check(drawn, capsys)
    assert f"  {best['recipe']}    # " in said
    assert f"{best['image_tokens']:,.0f} image tokens a record" in said
    assert "7 records, 0 faults" in said


def test_a_model_is_compared_as_it_is(drawn: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = ["eval", "diagnose", "--records", str(drawn / "records.json"), "--model", str(checkpoint)]
    assert cli.main([*known, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["resolutions"]
    assert (found["side"], found["records"]) == (120, 6)
    assert found["current"] == found["settings"][0]
    assert cli.main([*known, "--smallest", "0.5"]) == 0
    assert "no higher resolution is needed: 95 % of the text or more has at least 0.5 px" in capsys.readouterr().out
    assert cli.main([*known, "--smallest", "500"]) == 0
    assert "100.0 % of the text is below 500 px in the images themselves" in capsys.readouterr().out


def test_unknown_heights_are_not_guessed(unmeasured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = check(unmeasured, capsys)
    assert "letter heights: unknown" in said
    assert "--ocr-sample" in said
    assert "resolution: {" not in said
    assert json.loads(check(unmeasured, capsys, "--json"))["resolutions"] is None
    rows = json.loads((unmeasured / "records.json").read_text())
    for row in rows:
        del row["image"]
        row["conversations"][0]["value"] = "Hello?"
    (unmeasured / "records.json").write_text(json.dumps(rows))
    assert "letter heights" not in check(unmeasured, capsys)  # there is no image


def test_what_cannot_be_read_is_left_out(unmeasured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A height that is no number, a box without area, and an image whose size is not stated."""
    rows = json.loads((unmeasured / "records.json").read_text())
    rows[0]["text_height"], rows[1]["box"], rows[2]["text_height"] = "tall", [5, 5, 5, 5], 12
    (unmeasured / "records.json").write_text(json.dumps(rows))
    found = json.loads(check(unmeasured, capsys, "--json"))["resolutions"]
    assert (found["records"], found["drawn"], found["settings"][0]["median_height"]) == (1, 4, 6)


def test_a_record_of_very_many_images_is_measured_in_part(unmeasured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((unmeasured / "records.json").read_text())[:1]
    rows[0] |= {"image": ["0.png"] * 20_000, "text_height": 30}
    rows[0]["conversations"][0]["value"] = "<image>" * 20_000
    (unmeasured / "records.json").write_text(json.dumps(rows))
    found = json.loads(check(unmeasured, capsys, "--json"))["resolutions"]
    assert found["settings"][0]["image_tokens"] == 64 * 576


def test_stored_readings_count_line_by_line(unmeasured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading = {"width": 672, "height": 672, "hash": "0", "blank": False}
    lines = {"rapidocr": [a_line(0, 40, 5).as_json(), a_line(100, 10, 15).as_json()]}
    with ResumeJournal(unmeasured / "read.ocr.jsonl", {"format": 2}) as journal:
        for number in (0, 1):
            journal.append({"path": f"{number}.png", **reading, "lines": lines})
        journal.append({"path": "2.png", "error": "broken", "reason": "broken_image"})
        journal.append({"path": "3.png", "lines": lines})  # of an edited file: the size of the image is missing
    for given in ("read.json", "read.ocr.jsonl"):
        found = json.loads(check(unmeasured, capsys, "--json", "--heights", str(unmeasured / given)))["resolutions"]
        assert (found["records"], found["drawn"], found["settings"][0]["share_below"]) == (2, 4, 0.75)
    given = ["data", "check", str(unmeasured / "records.json"), "--images", str(unmeasured / "images")]
    assert cli.main([*given, "--heights", str(unmeasured / "other.json")]) == 2
    assert "other.json: there are no readings of OCR for it" in capsys.readouterr().err


def test_a_sample_is_read_on_request(
    unmeasured: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    monkeypatch.setattr(read_line_heights, "open_ocr_engine", lambda _name: engine)
    check(unmeasured, capsys)
    assert engine.sizes == []
    found = json.loads(check(unmeasured, capsys, "--json", "--ocr-sample", "3"))["resolutions"]
    assert engine.sizes == [(672, 672)] * 3
    assert (found["records"], found["settings"][0]["share_below"]) == (3, 0.9)
    check(unmeasured, capsys, "--ocr-sample", "100")
    assert len(engine.sizes) == 7
    known = ["eval", "diagnose", "--records", str(unmeasured / "records.json"), "--images", str(unmeasured / "images")]
    assert cli.main([*known, "--model", str(checkpoint), "--ocr-sample", "1"]) == 0
    said = capsys.readouterr().out
    assert "of 1 of 4 records with images" in said
    assert "unknown" not in said


def test_a_missing_engine_is_reported(
    unmeasured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise MissingDependencyError.at(name, "is not installed", f"install {name}")

    monkeypatch.setattr(read_line_heights, "open_ocr_engine", missing)
    given = ["data", "check", str(unmeasured / "records.json"), "--images", str(unmeasured / "images")]
    assert cli.main([*given, "--ocr-sample", "2"]) == 3
    assert "rapidocr: is not installed. Fix: install rapidocr" in capsys.readouterr().err


def test_letters_of_answers_are_measured_in_the_tiles(checkpoint: Path) -> None:
    plain = load_processor(str(checkpoint))
    tiles = describe_resolution(Tiles(max_tiles=4))
    tiled = LlavarProcessor(plain.image_processor, plain.tokenizer, patch_size=plain.patch_size, resolution=tiles)
    question = VqaQuestion("a", "What does it say?", ("EXIT",), None, text_height=20, size=(240, 240))
    heights = [measure_letter_height([question], None, "pad", one)["a"][0] for one in (plain, tiled)]
    assert heights == [10, 20]  # the tower's input has 120 pixels
