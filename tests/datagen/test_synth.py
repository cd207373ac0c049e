"""Synthetic images: they depend on seed and number alone, and their ground truth matches the pixels."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from llavar_peft.cli import main
from llavar_peft.data.check_records import check_records
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import open_records
from llavar_peft.datagen.synth.camera_distortion import draw_camera, homography, move_quads, photograph
from llavar_peft.datagen.synth.drawn_page import DrawnPage, draw_page
from llavar_peft.datagen.synth.font_faces import list_faces, missing_letters, open_face
from llavar_peft.datagen.synth.scene import PlacedLine
from llavar_peft.datagen.synth.synth_record import measure_answer
from llavar_peft.datagen.synth.synth_settings import KINDS, SynthSettings
from llavar_peft.datagen.synth.vocabulary import LANGUAGES, load_vocabulary
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.errors import ConfigError, DataError


def digest(page: DrawnPage) -> str:
    return sha256(page.encoded()[1] + repr((page.lines, page.quads, page.questions)).encode()).hexdigest()


@pytest.mark.parametrize("distort", ["none", "heavy"])
def test_a_page_depends_on_its_seed_and_number_alone(distort: str) -> None:
    settings = SynthSettings(width=320, distort=distort)  # type: ignore[arg-type]
    alone = [digest(draw_page(settings, index)) for index in (5, 2, 3)]
    assert alone == [digest(draw_page(settings, index)) for index in (5, 2, 3)]
    assert len({digest(draw_page(settings, index)) for index in range(12)}) == 12
    assert digest(draw_page(SynthSettings(width=320, distort=distort, seed=1), 2)) != alone[1]  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    settings = SynthSettings(width=256, distort="light")
    for workers, count in ((1, 34), (2, 34), (1, 7)):
        write_synthetic(tmp_path / f"{workers}x{count}", count, settings, workers)

    def files(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*") if path.is_file()}

    assert files("1x34") == files("2x34")
    few = {path.name: path.read_bytes() for path in (tmp_path / "1x7/images").iterdir()}
    assert len(few) == 7
    assert few.items() <= files("1x34").items()
    assert (tmp_path / "1x34/truth.jsonl").read_text().startswith((tmp_path / "1x7/truth.jsonl").read_text())


@pytest.mark.parametrize("kind", KINDS["detailed"])
@pytest.mark.parametrize("distort", ["none", "light", "heavy"])
def test_ink_is_where_the_truth_says(kind: str, distort: str) -> None:
    """Compare a line's box with that of its ink drawn alone, and check that the image has that ink."""
    settings = SynthSettings(kinds=(kind,), width=480, distort="none")  # type: ignore[arg-type]
    for index in range(3):
        page = draw_page(settings, index)
        for number in range(0, len(page.lines), 3):
            left, top, right, bottom = _ink_box(page, number)
            xs, ys = zip(*page.quads[number], strict=True)
            assert (min(xs), min(ys), max(xs), max(ys)) == pytest.approx((left, top, right, bottom), abs=0.01)
    photographed = draw_page(SynthSettings(kinds=(kind,), width=480, distort=distort), 1)  # type: ignore[arg-type]
    assert photographed.image.width == 480
    for quad in photographed.quads:
        assert all(0 <= x <= 480 and 0 <= y <= photographed.image.height for x, y in quad)


def _ink_box(page: DrawnPage, number: int) -> tuple[int, int, int, int]:
    line = page.lines[number]
    blank = Image.new("L", page.image.size)
    ImageDraw.Draw(blank).text((line.left, line.baseline), line.text, 255, open_face(line.face, line.size), anchor="ls")
    box = blank.getbbox()
    assert box is not None
    inked = np.asarray(blank) > 200
    drawn = np.abs(np.asarray(page.image, dtype=int) - np.array(line.ink)).max(axis=2)
    assert drawn[inked].max() < 60
    return box


def test_boxes_are_moved_with_the_photograph() -> None:
    page = Image.new("RGB", (400, 500), "white")
    page.paste((255, 0, 0), (120, 200, 180, 260))
    quad = ((120, 200), (180, 200), (180, 260), (120, 260))
    for seed in range(8):
        camera = draw_camera("heavy", Random(seed), *page.size)
        (moved,) = move_quads([quad], page.size, camera)
        pixels = np.asarray(photograph(page, camera), dtype=int)
        ys, xs = np.nonzero((pixels[:, :, 0] - pixels[:, :, 1] > 100) & _near(pixels.shape[:2], moved, 12))
        expected = [
            min(x for x, _ in moved),
            min(y for _, y in moved),
            max(x for x, _ in moved),
            max(y for _, y in moved),
        ]
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == pytest.approx(expected, abs=2)
    assert homography(quad, quad) == pytest.approx(np.eye(3), abs=1e-9)


def _near(shape: tuple[int, ...], quad: object, margin: int) -> np.ndarray:
    """Return the area to search, because the desk may be reddish too."""
    mask = np.zeros(shape, bool)
    points = np.array(quad)
    (left, top), (right, bottom) = points.min(0) - margin, points.max(0) + margin
    mask[max(0, int(top)) : int(bottom), max(0, int(left)) : int(right)] = True
    return mask


@pytest.mark.parametrize("language", LANGUAGES)
def test_packaged_fonts_have_all_letters_of_every_language(language: str) -> None:
    assert len(list_faces(None, load_vocabulary(language).alphabet)) == 6
    page = draw_page(SynthSettings(kinds=("documents",), width=320, languages=(language,)), 0)
    assert set("".join(page.transcript.split())) <= set(load_vocabulary(language).alphabet)


def test_a_font_without_the_letters_is_not_used(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("ascii.ttf"), tmp_path)  # DejaVuSansMono, cut down further
    assert missing_letters(str(tmp_path / "ascii.ttf"), "aäbж") == "äж"
    assert len(list_faces(tmp_path, load_vocabulary("de").alphabet)) == 6
    assert len(list_faces(tmp_path, "abc")) == 7
    with pytest.raises(DataError, match="no font has all letters"):
        list_faces(tmp_path, "日本")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(DataError, match=r"broken\.ttf: cannot be read as a font"):
        list_faces(tmp_path, "abc")
    with pytest.raises(ConfigError, match="use one of de, el, en"):
        draw_page(SynthSettings(languages=("xx",)), 0)


@pytest.mark.parametrize("task", ["transcribe", "question", "conversation"])
def test_the_command_writes_valid_records(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "10", "--width", "256", "--distort", "light", "--language", "de", "--task", task]
    assert main(["synth", "--out", str(tmp_path), *options]) == 0
    assert "10, with" in capsys.readouterr().out
    report = check_records(open_records(tmp_path / "records.json"), ImageRoots(tmp_path / "images"))
    assert (report.clean, report.records, report.images_opened) == (True, 10, 10)
    truths = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text("utf-8").splitlines()]
    records = json.loads((tmp_path / "records.json").read_text("utf-8"))
    assert [truth["id"] for truth in truths] == [record["id"] for record in records]
    assert [truth["kind"] for truth in truths] == [*KINDS["detailed"]] * 2
    for truth, record in zip(truths, records, strict=True):
        assert " ".join(line["text"] for line in truth["lines"]) == " ".join(truth["text"].split("\n"))
        said = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        answers = [truth["text"]] if task == "transcribe" else [answer for _, answer in truth["questions"]]
        assert set(said) <= set(answers)
        assert len(said) == (len(answers) if task == "conversation" else 1)
        assert (record["kind"], record["image_width"]) == (truth["kind"], truth["width"])
        inside = [line for line in truth["lines"] if _within(line["box"], record.get("box", [0, 0, 1e4, 1e4]))]
        assert "".join(said[0].split()) in "".join("".join(line["text"].split()) for line in inside)
        heights = [line["polygon"][3][1] - line["polygon"][0][1] for line in inside]
        assert 0.5 * min(heights) <= record["text_height"] <= 1.5 * max(heights)


def _within(box: list[float], around: list[float]) -> bool:
    return all(a >= b for a, b in zip(box[:2], around[:2], strict=True)) and all(
        a <= b for a, b in zip(box[2:], around[2:], strict=True)
    )


def test_an_answer_is_located_by_its_question() -> None:
    """Equal text elsewhere is ignored: a page number in a sentence, the price of another item."""
    words = ["paid 7 in all", "tea", "7", "milk", "7", "a title", "of two lines", "page 7"]
    lines = [PlacedLine(text, "", 9, 0, 0, (0, 0, 0), 0) for text in words]
    quads = [((0, y), (50, y), (50, y + 10 + y / 10), (0, y + 10 + y / 10)) for y in range(0, 800, 100)]

    def found(question: str, answer: str) -> tuple[float, list[float] | None]:
        measured = measure_answer(question, answer, lines, quads)
        return measured["text_height"], measured.get("box")

    assert found("How much is tea?", "7") == (30, [0, 200, 50, 230])
    assert found("How much is milk?", "7") == (50, [0, 400, 50, 450])
    assert found("What is the title?", "a title of two lines") == (65, [0, 500, 50, 670])
    assert found("What is there to read?", "all of it") == (45, None)


@pytest.mark.parametrize("task", ["transcribe", "question", "conversation"])
def test_letters_are_drawn_at_the_heights_that_a_model_sees(task: str, tmp_path: Path) -> None:
    options = [
        "--n",
        "12",
        "--style",
        "plain",
        "--task",
        task,
        "--heights",
        "4,9,16",
        "--side",
        "120",
        "--workers",
        "1",
    ]
    largest = ["--heights", "3-9", "--side", "120"] if task == "transcribe" else ["--kind", "signs"]
    assert main(["synth", "--out", str(tmp_path), *options, *largest]) == 0
    records = json.loads((tmp_path / "records.json").read_text("utf-8"))
    truths = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text("utf-8").splitlines()]
    heights = [record["drawn_height"] for record in records]
    if task != "transcribe":
        assert sorted(heights) == [4] * 4 + [9] * 4 + [16] * 4
        assert heights != sorted(heights)
    for record, truth in zip(records, truths, strict=True):
        side = record["image_width"]
        assert (side, record["prepared_side"]) == (record["image_height"], 120)
        assert record["text_height"] * 120 / side == pytest.approx(record["drawn_height"], rel=0.02, abs=0.1)
        with Image.open(tmp_path / "images" / record["image"]) as image:
            assert image.size == (side, side)
            for line in truth["lines"]:
                left, top, right, bottom = (round(edge) for edge in line["box"])
                assert 0 <= left < right <= side
                assert 0 <= top < bottom <= side
                inside = np.asarray(image.crop((left, top, right, bottom)).convert("L"), dtype=int)
                assert inside.max() - inside.min() > 60  # ink on its background, and not the margin


def test_heights_that_no_page_has_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["synth", "--out", str(tmp_path), "--n", "1", "--width", "256", "--kind", "documents"]
    assert main([*command, "--heights", "19"]) == 2
    said = capsys.readouterr().err
    assert "--heights: documents of the style detailed have no letters of 19 px" in said
    assert "Fix: use lower heights or --style plain" in said
    assert main([*command, "--heights", "3", "--side", "5"]) == 2
    assert "--side: got 5, expected 32 to 1344 pixels" in capsys.readouterr().err
    assert main([*command, "--heights", "3"]) == 0
