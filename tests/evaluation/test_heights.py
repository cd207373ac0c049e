"""Accuracy by letter height: what is shown and asked, where accuracy falls, and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessorPil

from llavar_peft import ModelConfig, Tiles, build_model, cli
from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.letter_canvas import MOST_SIDES, cropped_canvas, parse_heights, whole_canvas
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr import read_image_folder
from llavar_peft.datagen.ocr.ink_height import ink_height
from llavar_peft.datagen.ocr.ocr_lines import OcrLine
from llavar_peft.datagen.synth.font_faces import open_face, packaged_face
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.evaluation.heights.answer_places import find_answers, read_stored_texts
from llavar_peft.evaluation.heights.height_plan import HeightSettings, TooSmall, plan_heights
from llavar_peft.evaluation.heights.height_results import (
    Crossing,
    HeightCurve,
    HeightPoint,
    HeightResults,
    find_crossing,
    read_height_results,
)
from llavar_peft.evaluation.heights.heights_view import find_in_heights
from llavar_peft.evaluation.heights.measure_heights import score_height
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.inference.chat import Chat
from llavar_peft.types import ImageMode
from llavar_peft.weights.adapter.model_hash import identify_model

SIDE = 112
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def red_rows(image: Image.Image, mode: ImageMode) -> int:
    """Return the number of rows of the prepared image in which the red letters are seen."""
    prepared = prepare_image(image, mode, PROCESSOR)
    red = prepared[0] - prepared[1]
    middle = (red.max() + red.min()) / 2  # halfway to the background
    return int((red.amax(dim=1) > middle).sum())


# -- what a model is shown --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(40, 700), st.integers(40, 700)),
    share=st.floats(0.1, 0.3),
    height=st.integers(4, 24),
    mode=st.sampled_from(["pad", "pad_black", "square", "keep"]),
    place=st.sampled_from([(0.5, 0.5), (0.0, 0.0), (0.9, 0.2)]),
)
def test_letters_have_the_height_in_the_prepared_image(
    size: tuple[int, int], share: float, height: int, mode: ImageMode, place: tuple[float, float]
) -> None:
    letters = max(8, round(share * min(size)))
    side = 224 if mode == "keep" else SIDE
    image = Image.new("RGB", size, (60, 60, 60))
    left, top = (size[0] - letters) // 2, (size[1] - letters) // 2
    image.paste((255, 0, 0), (left, top, left + letters, top + letters))
    canvas = whole_canvas(size, letters, height, side, place=place, colour=(60, 60, 60))
    if canvas is None:
        assert letters * side / max(size) < height * 1.01
        return
    shown = canvas.show(image)
    assert max(shown.size) <= MOST_SIDES * side
    assert red_rows(shown, mode) == pytest.approx(height, abs=1.01)
    # No pixel of the image is lost, and where the square is not too large, none is changed.
    if canvas.scale == 1:
        x, y = (round(part) for part in canvas.move(0, 0))
        assert shown.crop((x, y, x + size[0], y + size[1])).tobytes() == image.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(60, 500), st.integers(60, 500)),
    where=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    wide=st.floats(0.02, 0.5),
    height=st.integers(4, 40),
)
def test_a_cropped_image_holds_the_answer(
    size: tuple[int, int], where: tuple[float, float], wide: float, height: int
) -> None:
    letters = 12
    width = max(letters, round(wide * size[0]))
    left, top = (
        round(share * (extent - part)) for share, extent, part in zip(where, size, (width, letters), strict=True)
    )
    image = Image.new("RGB", size, (60, 60, 60))
    image.paste((255, 0, 0), (left, top, left + width, top + letters))
    canvas = cropped_canvas(size, (left, top, left + width, top + letters), letters, height, SIDE, colour=(60, 60, 60))
    if canvas is None:
        assert width > letters * SIDE / height - 1
        return
    assert red_rows(canvas.show(image), "pad") == pytest.approx(height, abs=1.51)
    for start, extent in ((canvas.left, size[0]), (canvas.top, size[1])):
        assert 0 <= start <= extent - canvas.side or canvas.side > extent
    assert canvas.left <= left <= canvas.left + canvas.side - width


def test_a_canvas_is_bounded_however_large_its_image_is() -> None:
    image = Image.new("RGB", (3000, 2000))
    canvas = whole_canvas(image.size, 400, 3, SIDE)
    assert canvas is not None
    assert canvas.show(image).size == (MOST_SIDES * SIDE, MOST_SIDES * SIDE)


@pytest.mark.parametrize(
    ("text", "heights"),
    [("3-6", (3, 4, 5, 6)), ("7,3, 5", (3, 5, 7)), ("2.5,4-5,4", (2.5, 4, 5)), ("9", (9,))],
)
def test_heights_are_spans_and_lists(text: str, heights: Sequence[float]) -> None:
    assert parse_heights(text) == tuple(map(float, heights))


@pytest.mark.parametrize("text", ["", "3..9", "9-3", "0-4", "nan", "1e9", "a", "3-2000", "1-100", "-3", "inf"])
def test_other_heights_are_errors(text: str) -> None:
    with pytest.raises(ConfigError, match=r"heights: got .*\. Fix: "):
        parse_heights(text)


# -- which questions are asked ----------------------------------------------------------------------------------------


def question(number: int, letters: float | None, box: tuple[float, float, float, float] | None = None) -> VqaQuestion:
    return VqaQuestion(str(number), "What?", ("truth",), f"{number}.png", text_height=letters, box=box, size=(224, 112))


QUESTIONS = [
    question(0, 40),  # 20 px in the prepared image
    question(1, 16, (100, 50, 150, 66)),  # 8 px
    question(2, 10, (0, 50, 200, 60)),  # 5 px, and too wide for larger letters
    question(3, 4, (0, 0, 20, 4)),  # enlarged more than twice at 9 px
]


@pytest.mark.parametrize(
    ("too_small", "asked", "left_out"),
    [
        ("omit", {4: "01"[:1], 9: "0"}, {"too_small": 2, "enlarged": 1}),
        ("fewer", {4: "012", 9: "0"}, {"too_small": 1}),
        ("crop", {4: "01", 9: "01"}, {"too_wide": 1, "enlarged": 1}),
    ],
)
def test_questions_that_cannot_be_shown_are_left_out_and_counted(
    too_small: TooSmall, asked: dict[float, str], left_out: dict[str, int]
) -> None:
    chosen = HeightSettings(heights=(4.0, 9.0), too_small=too_small)
    plan = plan_heights(QUESTIONS, ImageRoots(), chosen, "pad", SIDE, {"yes_or_no": 3})
    assert {height: "".join(one.id for one in several) for height, several in plan.asked.items()} == asked
    assert plan.left_out == {"yes_or_no": 3, **left_out}
    assert plan.total == sum(map(len, plan.canvases.values()))


def test_heights_that_no_question_reaches_are_an_error_with_a_height_that_helps() -> None:
    chosen = HeightSettings(heights=(8.0, 30.0))
    with pytest.raises(DataError, match=r"no question can be asked at 30 px .*use heights of at most (\d+)") as caught:
        plan_heights(QUESTIONS[:3], ImageRoots(), chosen, "pad", SIDE)
    helpful = float(re.findall(r"at most (\d+)", str(caught.value))[0])
    fixed = plan_heights(QUESTIONS[:3], ImageRoots(), HeightSettings(heights=(helpful,)), "pad", SIDE)
    assert len(fixed.asked[helpful]) == 2
    with pytest.raises(DataError, match="check that the answers stand in the images"):
        plan_heights([], ImageRoots(), chosen, "pad", SIDE, {"not_found": 4})


@pytest.mark.parametrize(
    "wrong",
    [
        {"heights": ()},
        {"heights": (5.0, 3.0)},
        {"side": 3},
        {"protocol": "cer"},
        {"too_small": "x"},
        {"most_enlarged": 0},
    ],
)
def test_wrong_settings_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Fix: "):
        HeightSettings(**wrong)


# -- where answers stand ----------------------------------------------------------------------------------------------


def line(text: str, top: float, height: float = 20, left: float = 10, width: float = 120) -> OcrLine:
    box = ((left, top), (left + width, top), (left + width, top + height), (left, top + height))
    return OcrLine(text, box, 0.9)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """An image whose lines have letters of exactly 10 px, and of 20 px in the last one."""
    image = Image.new("RGB", (300, 300), "white")
    for top, height in ((10, 10), (50, 10), (90, 10), (130, 10), (170, 20)):
        image.paste((0, 0, 0), (20, top, 100, top + height))
    image.save(tmp_path / "page.png")
    return tmp_path


def readings(folder: Path, lines: Sequence[OcrLine], **more: Any) -> Path:
    entry = {"path": "page.png", "width": 300, "height": 300, "hash": "0", "blank": False}
    entry |= {"lines": {"rapidocr": [one.as_json() for one in lines]}, **more}
    with ResumeJournal(folder / "read.ocr.jsonl", {"format": 2}) as journal:
        journal.append(entry)
    return folder / "read.json"


@pytest.mark.parametrize(
    ("truths", "found"),
    [
        (("The Great Book!",), (10, (10, 45, 130, 105))),  # over two lines, after normalization
        (("nothing", "smith"), (20, (10, 165, 130, 195))),  # twice: the larger one
        (("mit",), "not_found"),  # whole words only
        (("7",), "not_found"),  # stands in too many places
        (("No",), "yes_or_no"),
    ],
)
def test_an_answer_is_found_with_the_height_of_its_ink(page: Path, truths: tuple[str, ...], found: Any) -> None:
    read = [line("by Smith 7", 5), line("the GREAT", 45), line("book", 85), line("more", 125), line("SMITH", 165, 30)]
    texts = read_stored_texts(readings(page, read), ["page.png"])
    asked = VqaQuestion("1", "What?", truths, "page.png")
    questions, left_out = find_answers([asked], texts, ImageRoots(page))
    if isinstance(found, str):
        assert (questions, left_out) == ([], {found: 1})
        return
    assert left_out == {}
    assert (questions[0].text_height, questions[0].box, questions[0].size) == (*found, (300, 300))


def test_known_answers_stay_and_other_ones_need_a_reading(page: Path) -> None:
    known = VqaQuestion("1", "What?", ("x",), "page.png", text_height=9)
    bare, blind = VqaQuestion("2", "What?", ("abc",), "page.png"), VqaQuestion("3", "What?", ("abc",))
    failed = read_stored_texts(readings(page, [], error="failed", reason="engine_failed"), ["page.png"])
    questions, left_out = find_answers([known, bare, blind], failed, ImageRoots(page))
    assert (questions, left_out) == ([known], {"unreadable": 1, "no_image": 1})
    with pytest.raises(DataError, match="holds none of the images"):
        read_stored_texts(page / "read.json", ["other.png"])
    with pytest.raises(DataError, match="no readings of OCR"):
        read_stored_texts(page / "none.json", ["page.png"])


@pytest.mark.parametrize("angle", [0, 4, -7, 90])
@pytest.mark.parametrize("noise", [0, 12])
def test_ink_is_measured_without_the_room_around_it(angle: float, noise: float) -> None:
    """Of text in a box that is half as high again, turned with its box, beside another line and on noise."""
    font = open_face(packaged_face("DejaVuSans"), 40)
    left, top, right, bottom = font.getbbox("Hxgd 25", anchor="ls")
    image = Image.new("RGB", (400, 400), (230, 230, 220))
    ImageDraw.Draw(image).text((120, 200), "Hxgd 25", (20, 30, 60), font, anchor="ls")
    ImageDraw.Draw(image).text((120, 265), "above", (20, 30, 60), font, anchor="ls")
    image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(230, 230, 220))
    if noise:
        grain = np.random.default_rng(0).normal(0, noise, (400, 400, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    height = bottom - top
    corners = [(x, y) for y, x in ((top - height / 4, left - 9), (top - height / 4, right + 9))]
    corners += [(x, y) for y, x in ((bottom + height / 4, right + 9), (bottom + height / 4, left - 9))]
    turn = np.exp(-1j * np.radians(angle))
    turned = [(complex(x + 120 - 200, y + 200 - 200) * turn) for x, y in corners]
    first, second, third, fourth = ((point.real + 200, point.imag + 200) for point in turned)
    measured = ink_height(image, OcrLine("Hxgd 25", (first, second, third, fourth), 1.0))
    assert measured == pytest.approx(height, abs=2.5)
    assert measured < 1.3 * height


# -- figures ----------------------------------------------------------------------------------------------------------


def points(*values: float) -> list[HeightPoint]:
    return [HeightPoint(3.0 + at, value, value, value, 10, 10, 0) for at, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "crossing"),
    [
        ((0, 80, 100, 100), Crossing(90, "crossed", 4.5)),
        ((95, 80, 100, 100), Crossing(90, "crossed", 4.5)),  # a lucky small height does not count
        ((0, 90, 95), Crossing(90, "crossed", 4.0)),
        ((92, 90, 95), Crossing(90, "always", None)),
        ((92, 95, 89), Crossing(90, "never", None)),
        ((95,), Crossing(90, "always", None)),
    ],
)
def test_accuracy_falls_where_it_last_was_high_enough(values: tuple[float, ...], crossing: Crossing) -> None:
    found = find_crossing(points(*values), 90)
    assert (found.state, found.threshold) == (crossing.state, 90)
    assert found.height == (None if crossing.height is None else pytest.approx(crossing.height))


def test_answers_that_are_all_right_have_an_interval_too() -> None:
    answered = [VqaQuestion(str(n), "What?", ("tea",), f"{n}.png", answer="tea", text_height=5) for n in range(6)]
    point = score_height(8.0, answered, HeightSettings())
    assert (point.value, point.questions, point.images, point.enlarged) == (100, 6, 6, 6)
    assert point.low == pytest.approx(61, abs=1)  # Wilson's, of six
    assert point.high == pytest.approx(100)


@pytest.mark.parametrize(
    ("figures", "sentences"),
    [
        (((3, 95, 91, 98, 900), (9, 97, 94, 99, 900)), ["a still reads letters of 3 px, the lowest that were asked"]),
        (((3, 5, 2, 9, 900), (9, 60, 55, 65, 900)), ["a answers 60 % at 9 px, the greatest height: ask at greater"]),
        (((3, 50, 47, 53, 900), (9, 92, 85, 97, 900)), []),
        (
            ((3, 50, 30, 70, 20), (9, 92, 85, 97, 900)),
            ["20 questions say little: the 95 % interval of exact of a at 3"],
        ),
    ],
)
def test_what_the_figures_say_next(figures: tuple[tuple[float, ...], ...], sentences: list[str]) -> None:
    every = tuple(HeightPoint(*one[:4], int(one[4]), 20, 0) for one in figures)
    curve = HeightCurve("a", Setting(), 336, every, {})
    found = find_in_heights(HeightResults("d", "exact", 900, "omit", "boxes", (curve,)))
    assert len(found) == len(sentences)
    assert all(one.text.startswith(sentence) for one, sentence in zip(found, sentences, strict=True))


# -- the command ------------------------------------------------------------------------------------------------------

KNOWN = ["--max-new-tokens", "2", "--batch-size", "2", "--workers", "1"]


def run(folder: Path, *options: str) -> int:
    return cli.main(["eval", "heights", *KNOWN, "--out", str(folder / "mine.heights.json"), *options])


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """The images that models are asked about."""
    images: list[Image.Image] = []
    request = Chat.request

    def keep(self: Chat, image: Any, *args: Any, **more: Any) -> Any:
        images.append(image)
        return request(self, image, *args, **more)

    monkeypatch.setattr(Chat, "request", keep)
    return images


def test_two_models_on_drawn_images(
    checkpoint: Path, tmp_path: Path, shown: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--synth", "--n", "4", "--heights", "4,8", "--metric", "exact"]
    assert run(tmp_path, "--model", f"first={checkpoint}", *options) == 0
    assert [image.size for image in shown[:4]] > [image.size for image in shown[4:]]  # twice as large a background
    assert len(shown) == 8
    # Another run with a second model asks only what was not asked before. The two have the same weights.
    assert run(tmp_path, "--model", f"first={checkpoint}", "--model", f"a <b>={checkpoint}", *options) == 0
    assert len(shown) == 8
    results = read_height_results(tmp_path / "mine.heights.json")
    assert [curve.name for curve in results.curves] == ["first", "a <b>"]
    assert [(point.height, point.questions) for point in results.curves[0].points] == [(4, 4), (8, 4)]
    assert results.curves[0].side == 120
    written = json.loads((tmp_path / "mine.heights.json").read_text())
    assert [one["threshold"] for one in written["curves"][0]["crossings"]] == [90, 0]
    page = (tmp_path / "mine.heights.html").read_text()
    assert page.count('src="data:image') == 2  # what a model sees at the lowest and the greatest height
    assert page.count('class="line curve') == page.count('class="band curve') == 2
    assert "a &lt;b&gt;" in page
    assert "a <b>" not in page
    assert "of 120 x 120 pixels that a plain model sees" in page
    printed = capsys.readouterr()
    assert "below half of the best at" in printed.out
    assert "next: first answers 0 % at 8 px, the greatest height" in printed.err
    assert "next: 4 questions say little: the 95 % interval of exact of " in printed.err
    # It becomes a part of a report.
    arguments = ["report", "--heights", str(tmp_path / "mine.heights.json"), "--out", str(tmp_path / "report.html")]
    assert cli.main(arguments) == 0
    assert (tmp_path / "report.html").read_text().count('class="band curve') == 2


def test_the_same_weights_at_another_resolution_are_asked(tmp_path: Path, shown: list[Image.Image]) -> None:
    """Their hash is the same, but not what they see."""
    parts = Path(str(files("llavar_peft") / "assets/tiny"))
    language_model, tower = str(parts / "language_model"), str(parts / "vision_tower")
    options = ["--synth", "--n", "2", "--heights", "8"]
    for name, grid in (("wide", (1, 2)), ("tall", (2, 1))):
        config = ModelConfig(
            language_model=language_model, vision_tower=tower, dtype="float32", resolution=Tiles(grid=(grid,))
        )
        torch.manual_seed(0)
        model, processor = build_model(config)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    assert identify_model(tmp_path / "wide") == identify_model(tmp_path / "tall")
    assert run(tmp_path, "--model", str(tmp_path / "wide"), "--model", str(tmp_path / "tall"), *options) == 0
    assert len(shown) == 4


def test_an_interrupted_run_resumes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(checkpoint), "--synth", "--n", "4", "--heights", "4,8", "--side", "336"]
    answer, calls = Chat.answer, list[int]()

    def interrupt(self: Chat, requests: Any, **more: Any) -> Any:
        calls.append(len(requests))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(self, requests, **more)

    monkeypatch.setattr(Chat, "answer", interrupt)
    assert run(tmp_path, *options) == 4
    assert "run the same command again to resume" in capsys.readouterr().err
    assert not (tmp_path / "mine.heights.json").exists()
    assert run(tmp_path, *options) == 0
    assert calls == [2, 2, 2, 2, 2]  # the last one again
    # Answers at other heights, or to other images, are not taken for these.
    assert run(tmp_path, *options, "--side", "300") == 2
    assert "was written by a run with other settings" in capsys.readouterr().err


def test_a_data_set_whose_answers_an_engine_finds(
    checkpoint: Path,
    images: Path,
    tmp_path: Path,
    shown: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = json.loads((images / "dataset.json").read_text())["data"]
    drawn = {row["image"]: row for row in map(json.loads, (images / "truth.jsonl").read_text().splitlines())}
    bare = [{key: row[key] for key in ("question_id", "question", "answers", "image")} for row in rows]
    bare.append({"question_id": 99, "question": "Is it?", "answers": ["yes"], "image": bare[0]["image"]})
    bare.append({"question_id": 98, "question": "Where?", "answers": ["elsewhere"], "image": bare[0]["image"]})
    (tmp_path / "dataset.json").write_text(json.dumps(bare))
    read: list[tuple[int, int]] = []

    class Engine:
        name, version = "tesseract", "1"

        def read(self, image: Image.Image) -> tuple[OcrLine, ...]:
            read.append(image.size)
            truth = next(one for one in drawn.values() if (one["width"], one["height"]) == image.size)
            return tuple(OcrLine(one["text"], tuple(map(tuple, one["polygon"])), 1.0) for one in truth["lines"])

    monkeypatch.setattr(read_image_folder, "open_ocr_engine", lambda *_: Engine())
    options = [
        "--model",
        str(checkpoint),
        "--dataset",
        str(tmp_path / "dataset.json"),
        "--images",
        str(images / "images"),
    ]
    options += ["--engine", "tesseract", "--heights", "5,9"]
    assert run(tmp_path, *options, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["total"], plain["measured"]) == (7, "tesseract and the ink in its boxes")
    assert plain["curves"][0]["left_out"] == {"yes_or_no": 1, "not_found": 1}
    assert [point["questions"] for point in plain["curves"][0]["points"]] == [5, 5]
    assert len(read) == 5  # once for each image
    assert run(tmp_path, *options) == 0
    assert (len(read), len(shown)) == (5, 10)
    assert "2 left out: 1 answered by yes or no; 1 whose answer is not found in the image." in capsys.readouterr().out


def _without_answer(folder: Path, results: dict[str, Any]) -> None:
    results["curves"][0]["points"] = []


def _text_as_figure(folder: Path, results: dict[str, Any]) -> None:
    results["curves"][0]["points"][0]["value"] = "much"


def _beyond(folder: Path, results: dict[str, Any]) -> None:
    results["curves"][0]["points"][0]["high"] = 1e9


def _other_format(folder: Path, results: dict[str, Any]) -> None:
    results["format"] = 9


@pytest.mark.parametrize("damage", [_without_answer, _text_as_figure, _beyond, _other_format])
def test_damaged_figures_are_named(
    damage: Callable[[Path, dict[str, Any]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = {"name": "a", "setting": {}, "side": 336, "points": [vars_of(one) for one in points(1, 2)], "left_out": {}}
    results = {"format": 1, "dataset": "d", "protocol": "exact", "total": 2, "too_small": "omit", "measured": "x"}
    results |= {"curves": [curve]}
    path = tmp_path / "r.heights.json"
    path.write_text(json.dumps(results))
    assert len(read_height_results(path).curves[0].points) == 2
    damage(tmp_path, results)
    path.write_text(json.dumps(results))
    assert cli.main(["report", "--heights", str(path), "--out", str(tmp_path / "r.html")]) == 2
    assert f"{path}: cannot be read as figures by height" in capsys.readouterr().err


def vars_of(point: HeightPoint) -> dict[str, Any]:
    return {name: getattr(point, name) for name in HeightPoint.__slots__}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m"], "it needs --dataset or --synth"),
        (["--model", "m", "--synth", "--dataset", "d.json"], "it needs --dataset or --synth"),
        (["--model", "m", "--synth", "--heights", "big"], "--heights: got 'big'"),
        (["--model", "m", "--synth", "--metric", "wer"], "--metric: got 'wer'"),
        (["--model", "x/m", "--model", "y/m", "--synth"], "--model: 'm' is the name of both x/m and y/m"),
        (["--model", "m", "--model", "n", "--adapter", "a", "--synth"], "--adapter: an adapter belongs to one model"),
        (["--model", "m", "--adapter", "x/m", "--synth"], "--adapter: 'm' is the name of the model too"),
        (["--model", "m", "--synth", "--out", "page.html"], "expected a name that ends in .json"),
    ],
)
def test_wrong_options_are_errors(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "heights", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Fix: " in said
