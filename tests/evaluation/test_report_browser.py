"""The report in a real browser: as it looks on a wide and on a narrow screen, and that it needs nothing but itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavar_peft.evaluation.heights.height_results import (
    HeightCurve,
    HeightPoint,
    HeightResults,
    write_height_results,
)
from llavar_peft.evaluation.report.write_report import ReportSettings, write_report
from llavar_peft.evaluation.vqa.scored_results import Setting, score_answers, write_results
from llavar_peft.evaluation.vqa.vqa_questions import read_predictions
from tests.serving.browser import Browser, find_chromium, open_browser

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

LONG = "Supercalifragilistic" * 12
"""Without a place where a line could be broken."""
TOO_WIDE = """
[...document.querySelectorAll('body *')].filter(it => {
  if (it.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let up = it.parentElement; up; up = up.parentElement)
    if (getComputedStyle(up).overflowX != 'visible') return false;  // may be scrolled within
  return true;
}).slice(0, 5).map(it => `${it.tagName}.${it.getAttribute('class')} ${it.textContent.slice(0, 60)}`)
"""


def _results(path: Path, source: Path, said: dict[int, str], setting: Setting) -> None:
    rows: list[dict[str, Any]] = [
        {"question_id": number, "question": f"What is written on sign {number}?", "answers": [f"TRUTH {number}"],
         "image": f"{number}.png", "prediction": said.get(number, f"TRUTH {number}"), "dataset": "coco-text",
         "text_height": 6 + 4 * number, "image_width": 336, "image_height": 336}
        for number in range(8)
    ]  # fmt: skip
    source.write_text(json.dumps(rows), encoding="utf-8")
    questions = read_predictions(source)
    measures = {one.id: (one.text_height, None) for one in questions}
    write_results(score_answers(questions, str(source), setting, (), measures), path)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two stages with curves, images, the paper's figures, and answers that no line can hold."""
    folder = tmp_path_factory.mktemp("report") / "run"
    images = folder.parent / "images"
    images.mkdir()
    for number in range(8):
        size = (900, 120) if number % 2 else (90, 400)
        Image.new("RGB", size, (30 * number, 90, 120)).save(images / f"{number}.png")
    for stage in ("one", "two"):
        (folder / stage).mkdir(parents=True)
        steps = [
            {"step": n, "loss": 3 / n, "tokens": 1000, "seconds": 0.5, "learning_rate": 1e-3, "peak_memory_mb": 100 + n}
            for n in range(1, 61)
        ]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "stages.json").write_text('["one", "two"]')
    (folder / "recipe.yaml").write_text(f"stages: [{{data: {{images: {images}}}}}]\n")
    source = folder.parent / "LLaVAR_STVQA.json"
    how = {"prompt": "{question} " + LONG, "model_hash": "0" * 64, "temperature": 0.0}
    first = Setting(model=str(folder / "one/model"), **how)
    _results(folder / "z.results.json", source, {0: "wrong", 1: LONG, 3: "no"}, first)
    _results(folder / "a.results.json", source, {1: LONG, 2: "TRUTH"}, Setting(model=str(folder / "model"), **how))
    points = tuple(
        HeightPoint(height, 4 * height, 3 * height, 5 * height, 90, 90, 2) for height in map(float, range(3, 20))
    )
    curves = tuple(HeightCurve(name, first, 336.0, points, {"not_found": 1}) for name in ("plain", LONG, "c", "d", "e"))
    heights = HeightResults(str(source), "exact", 91, "omit", LONG, curves)
    write_height_results(heights, folder / "mine.heights.json")
    return write_report(folder, settings=ReportSettings(metric="multimodalocr"))


@pytest.fixture
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with open_browser(CHROMIUM) as page:
        yield page


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_asks_the_net_for_nothing_and_complains_of_nothing(browser: Browser, report: Path, width: int) -> None:
    browser.resize(width, 900)
    browser.open(report.as_uri())
    browser.wait_for("document.readyState == 'complete' && document.querySelectorAll('img').length")
    browser.run("document.querySelectorAll('details').forEach(it => it.open = true)")
    browser.wait_for("[...document.images].every(it => it.loading == 'lazy' || it.naturalWidth > 0)")
    if folder := os.environ.get("LLAVAR_SCREENSHOTS"):
        height = browser.run("document.documentElement.scrollHeight")
        browser.resize(width, min(height, 8000))
        browser.shoot(Path(folder) / f"report-{width}.png")
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width, browser.run(TOO_WIDE)
    assert browser.run(TOO_WIDE) == []
    assert "39.2" in browser.run("document.body.innerText")
    outside = [url for url in browser.requested if not url.startswith("data:") and url != report.as_uri()]
    assert outside == []
    assert browser.errors == []
