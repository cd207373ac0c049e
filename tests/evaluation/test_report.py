"""The report: of a run, of results, of both; safe for any text, and below its size limit."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavar_peft import cli
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.evaluation.judge.judge_reviews import Review, write_reviews
from llavar_peft.evaluation.report.report_view import Images, Labelled, view_dataset
from llavar_peft.evaluation.report.write_report import ReportSettings, write_report
from llavar_peft.evaluation.vqa.scored_results import Setting, score_answers, write_results
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion, read_predictions
from llavar_peft.page.page_templates import MOST_BYTES

XSS = "</dd><script>alert('x')</script><img src=x onerror=\"alert(1)\">&'{{ 7 * 7 }}"


class Page(HTMLParser):
    """A page's tags with their attributes, and its words."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._words: list[str] = []
        self._style = False
        self.feed(self.source)
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._style:
            self._words.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def results(path: Path, said: dict[str, str], model: Path | None = None, **more: Any) -> Path:
    """Results of a few questions, answered as ``said``, else right."""
    rows = [
        {"question_id": key, "question": f"What is {key}?", "answers": [f"TRUTH {key}"], "image": f"{key}.png",
         "prediction": said.get(key, f"TRUTH {key}"), "text_height": 10 + 5 * number, "image_width": 336,
         "image_height": 336, **more}
        for number, key in enumerate("abcd")
    ]  # fmt: skip
    source = path.with_name("STVQA.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(json.dumps(rows), encoding="utf-8")
    questions = read_predictions(source)
    measures = {one.id: (one.text_height, None) for one in questions}
    setting = Setting(model=None if model is None else str(model), temperature=0.0)
    write_results(score_answers(questions, str(source), setting, (), measures), path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, key in enumerate("abcd"):
        Image.new("RGB", (60, 40), (60 * number, 90, 120)).save(folder / f"{key}.png")
    return folder


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Path:
    """Two stages of 30 steps, with results after each."""
    folder = tmp_path / "run"
    for stage in ("one", "two"):
        (folder / stage).mkdir(parents=True)
        steps = [
            {"step": n, "loss": 3 / n, "tokens": 1000, "seconds": 0.5, "learning_rate": 1e-3, "peak_memory_mb": 100 + n}
            for n in range(1, 31)
        ]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "stages.json").write_text('["one", "two"]')
    (folder / "recipe.yaml").write_text(f"stages: [{{data: {{images: {images}}}}}]\n")
    # By their names the second would come first.
    results(folder / "z.results.json", {"a": "wrong", "b": "TRUTH x"}, folder / "one/model")
    results(folder / "a.results.json", {"b": "TRUTH x", "c": "TRUTH"}, folder / "model")
    return folder


def test_reviews_of_a_judge_are_shown(run: Path, tmp_path: Path) -> None:
    def review(number: int, category: str, scores: tuple[float, float] | None) -> Review:
        how = {"judge_model": "gpt-4"}
        return Review(number, number, "a", "b", category, "8 9", scores, settings=how)

    reviews = [review(1, "conv", (8, 6)), review(2, "detail", (10, 10)), review(3, "detail", None)]
    write_reviews(reviews, run / "coco.reviews.jsonl")
    write_report(run)
    said = "judged by gpt-4 against the reference, 75.0 to 100.0, 2 reviews, conv 75.0, detail 100.0, 1 without scores"
    text = Page(run / "report.html").text
    assert f"coco 88.9 % {said}" in text
    assert "STVQA 50.0 %" in text
    alone = ["report", "--reviews", str(run / "coco.reviews.jsonl"), "--out", str(tmp_path / "alone.html")]
    assert cli.main(alone) == 0
    assert f"coco 88.9 % {said}" in Page(tmp_path / "alone.html").text
    write_reviews([review(1, "conv", (0, 5))], run / "coco.reviews.jsonl")
    with pytest.raises(DataError, match="gives the reference no points"):
        write_report(run)


def test_a_run_shows_what_each_stage_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run), "--metric", "exact"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = Page(run / "report.html")
    for words in (
        "STVQA 50.0 %",
        "Protocol after one after two Difference Published",
        "exact 50.0 15.0 to 85.0 50.0 15.0 to 85.0 +0.0",
        "39.2",  # the paper's, on a data set of this name
        "From 'after one' to 'after two': 1 of 4 answers became better, 1 became worse.",
        "By letter height",
        "What the protocols count multimodalocr a truth occurs as whole words in the answer",
        "Useful tokens per second 2,000",
        "Peak memory, MB",
        "Learning rate",
    ):
        assert words in page.text, words
    better, worse, best, _ = re.split("Became better|Became worse|>Best|>Worst", page.source)[1:]
    assert ["What is a?" in part for part in (better, worse)] == [True, False]
    assert ["What is c?" in part for part in (better, worse)] == [False, True]
    assert "TRUTH<mark> c</mark>" not in worse  # a missing character is an empty mark
    assert "TRUTH<mark></mark>" in worse
    assert best.index("What is a?") < best.index("What is d?")  # both right: the smaller letters first
    assert page.count("img") == 6  # of the folder that the recipe names
    first = (run / "report.html").read_bytes()
    write_report(run, settings=ReportSettings(metric="exact"))
    assert (run / "report.html").read_bytes() == first


def test_results_without_a_run_next_to_a_previous_run(run: Path, tmp_path: Path) -> None:
    mine, out = results(tmp_path / "mine.json", {"a": "wrong"}), tmp_path / "page.html"
    settings = ReportSettings(results=[mine], before=[run], metric="exact", title="Mine")
    page = Page(write_report(None, out, settings))
    # Of the other run's two, the later.
    assert "Protocol previous run: a mine Difference" in page.text
    assert "exact 50.0 15.0 to 85.0 75.0" in page.text
    assert "2 of 4 answers became better, 1 became worse" in page.text
    assert "give its folder with --images" in page.text
    assert "Loss" not in page.text


def test_a_run_without_results_and_an_empty_run(run: Path, tmp_path: Path) -> None:
    for path in run.glob("*.results.json"):
        path.unlink()
    page = Page(write_report(run))
    assert "No results of an evaluation were found" in page.text
    assert "Useful tokens per second" in page.text
    (tmp_path / "new").mkdir()
    with pytest.raises(ConfigError, match="neither steps of a run nor results"):
        write_report(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_other_questions_have_their_own_table(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"question": "Else?", "answers": ["A"], "answer": "A", "prediction": "A"}]))
    assert cli.main(["eval", "vqa", "--predictions", str(other), "--out", str(tmp_path / "o.json")]) == 0
    page = Page(write_report(run, settings=ReportSettings(results=[tmp_path / "o.json"], before=[run])))
    assert "other 1 records" in page.text
    assert "Protocol previous run: a after one after two" in page.text


def test_hostile_text_stays_text(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "<b>run"
    evil = {"id": XSS, "image": None, "question": XSS, "truth": XSS, "answer": XSS, "correct": False}
    look = {"step": 1, "when": "end", "exact_match": 0.0, "count": 1, "samples": [evil]}
    (folder / "s<i>").mkdir(parents=True)
    (folder / "s<i>/probe.jsonl").write_text(json.dumps(look))
    (folder / "s<i>/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    (folder / "recipe.yaml").write_text(f"name: {json.dumps(XSS)}")
    rows = [
        {"question_id": f"{XSS}{n}", "question": XSS, "answers": [f"{XSS}{n}"], "prediction": said, XSS: f"<u>{n}"[:40],
         "image": image}
        for n, (said, image) in enumerate([(XSS, XSS), ("\x00\ud800\u202e\x1b[31m", "../../secret.png"), ("", "a.png")])
    ]  # fmt: skip
    source = tmp_path / "<img src=x onerror=alert(1)>.json"
    source.write_text(json.dumps(rows))
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    setting = Setting(model=XSS, prompt=XSS, model_hash=XSS)
    for name in ("x", f"{XSS[:4].replace('/', '')}y"):
        write_results(score_answers(read_predictions(source), str(source), setting), folder / f"{name}.results.json")
    page = Page(write_report(folder, settings=ReportSettings(title=XSS, images=[images])))
    assert not {"script", "u", "object", "iframe"} & {name for name, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    sources = [attributes["src"] for name, attributes in page.tags if name == "img"]
    assert sources  # that of the third question; the second leads out of its folder
    assert len(set(sources)) == 1
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in {"src", "href"}]
    assert all(value and value.startswith("data:") for value in addresses)
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.tags)
    assert "{{ 7 * 7 }}" in page.source
    assert not re.search(r"url\(|@import", page.source)
    assert not set(page.source) & (set(map(chr, range(32))) - {"\n", "\t"})


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("LLaVAR_STVQA.json", "39.2"),
        ("ST-VQA_first500.json", "39.2"),
        ("TextVQA_0.5.1_val.json", "48.5"),
        ("results/docVQA.json", "11.6"),
        ("ocr-vqa test", "23.8"),  # given by --name
        ("CT80/test_label.txt", ""),  # a folder's name says nothing
        ("CT80", "83.0"),
        ("Chart-QA human", "13.5"),
        ("test-vqa.json", ""),
        ("TESTVQA.json", ""),
        ("val_v1.0.json", ""),
    ],
)
def test_the_paper_s_figures_are_found_by_the_data_set_s_name(name: str, published: str) -> None:
    scored = score_answers([VqaQuestion("0", "Q?", ("A",), answer="A")], name, Setting())
    view = view_dataset([Labelled("now", "now", scored)], "multimodalocr", Images([]), 0)
    assert next(row.paper for row in view.rows if row.protocol == "multimodalocr") == published


def test_a_data_set_may_be_named(tmp_path: Path) -> None:
    source = tmp_path / "val_v1.0.json"
    source.write_text(json.dumps([{"question": "Q?", "gt_answers": ["A"], "answer": "A"}]))
    out = tmp_path / "r.json"
    assert cli.main(["eval", "vqa", "--predictions", str(source), "--name", "DocVQA", "--out", str(out)]) == 0
    page = Page(write_report(None, tmp_path / "page.html", ReportSettings(results=[out])))
    assert "DocVQA 1 records" in page.text
    assert "11.6" in page.text


@pytest.mark.slow
def test_stays_under_the_cap(tmp_path: Path) -> None:
    folder = tmp_path / "noise"
    folder.mkdir()
    rows = []
    for number in range(60):
        noise = Image.frombytes("RGB", (400, 400), random.Random(number).randbytes(400 * 400 * 3))
        noise.save(folder / f"{number}.png", compress_level=0)
        rows.append({"question": "Q?", "answers": ["A" * 5000], "prediction": "B", "image": f"{number}.png"})
    source = tmp_path / "many.json"
    source.write_text(json.dumps(rows))
    write_results(score_answers(read_predictions(source), str(source), Setting()), tmp_path / "r.json")
    settings = ReportSettings(results=[tmp_path / "r.json"], images=[folder], images_per_row=40)
    page = write_report(None, tmp_path / "page.html", settings)
    assert MOST_BYTES / 4 < page.stat().st_size <= MOST_BYTES
    assert 8 <= Page(page).count("img") < 60


def test_invalid_reports_are_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither steps of a run nor results"):
        write_report(None, tmp_path / "page.html")
    with pytest.raises(ConfigError, match="nor an output file"):
        write_report(None)
    with pytest.raises(ConfigError, match="was not scored by 'f1'"):
        write_report(run, settings=ReportSettings(metric="f1"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no results"):
        write_report(run, settings=ReportSettings(before=[tmp_path / "empty"]))
    with pytest.raises(DataError, match=r"recipe\.yaml: not valid JSON .* Fix: give a file written by"):
        write_report(run, settings=ReportSettings(results=[run / "recipe.yaml"]))
    with pytest.raises(DataError, match="no such folder"):
        write_report(tmp_path / "none")
