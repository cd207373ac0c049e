"""The page of a run: escaped, self-contained, and valid while the run is still writing."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavar_peft.errors import DataError, EnvironmentFaultError
from llavar_peft.page.charts import loss_chart, running_mean
from llavar_peft.page.page_templates import MOST_BYTES
from llavar_peft.page.run_figures import wilson
from llavar_peft.page.run_page import write_run_page

XSS = "</dd><script>alert('x')</script><img src=x onerror=\"alert(1)\">&'{{ 7 * 7 }}"


class Elements(HTMLParser):
    """Collects the tags of a page with their attributes and checks that they are nested."""

    VOID = frozenset({"meta", "link", "img", "br", "path"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def append(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    figures = {"epoch": number / 10, "learning_rate": 2e-3 / number, "tokens": 1000, "supervised_tokens": 100}
    return {"step": number, "loss": loss, "grad_norm": 1.0, "seconds": 0.5, **figures, **more}


def sample(number: int, answer: str, **more: Any) -> dict[str, Any]:
    truth = f"SHOP {number}"
    asked = {"image": f"probe/{number}.png", "question": "What is written?", "truth": truth}
    return {"id": str(number), **asked, "answer": answer, "correct": answer == truth, **more}


def look(at: int, when: str, share: float, samples: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    figures = {"held_out_loss": 2.0 - share, "exact_match": share, "character_accuracy": share, "count": len(samples)}
    return {"step": at, "when": when, "samples": samples, "blank_exact_match": 0.0, **figures, **more}


def image(path: Path, seed: int, size: tuple[int, int] = (40, 30), noise: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (seed % 256, 90, 120))
    if noise:
        image.frombytes(random.Random(seed).randbytes(size[0] * size[1] * 3))
    image.save(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two stages with two images each and probes at the start, in the middle and at the end."""
    folder = tmp_path / "signs"
    for stage, shares in (("one", (0.0, 0.5, 0.5)), ("two", (0.5, 0.5, 1.0))):
        for number in (1, 2):
            image(folder / stage / "probe" / f"{number}.png", number)
        append(folder / stage / "metrics.jsonl", *(step(n, 3.0 / n, peak_memory_mb=2048) for n in range(1, 41)))
        for at, when, share in zip((0, 20, 40), ("start", "step", "end"), shares, strict=True):
            first = "SHOP 1" if share else f"SHAP 1 {stage}"
            samples = [sample(1, first), sample(2, "SHOP 2" if share == 1 else "a dog")]
            append(folder / stage / "probe.jsonl", look(at, when, share, samples))
    append(folder / "one" / "dropped.jsonl", *({"id": f"r{n}", "reason": "image_missing"} for n in range(5)))
    (folder / "stages.json").write_text('["one", "two"]', encoding="utf-8")
    (folder / "versions.json").write_text('{"torch": "2.9.1", "cuda": null}', encoding="utf-8")
    (folder / "recipe.yaml").write_text("seed: 0\n", encoding="utf-8")
    return folder


def page_of(folder: Path, **options: Any) -> str:
    return write_run_page(folder, **options).read_text(encoding="utf-8")


def test_the_command_names_the_folder_of_the_run(run: Path) -> None:
    assert f"llavar-peft ask --model {run} --image FILE" in page_of(run)


def test_the_page_shows_the_results_of_the_run(run: Path) -> None:
    page = Elements(page_of(run, title="Signs", extra=[("Device", "a CPU")], notes=["A note."], model_dir="my model"))
    for words in (
        "before training 0.0 %",
        "after one 50.0 %",
        "after two 100.0 %",
        "0.0 % with blank images",
        "Steps 80 Time in steps 40.0 s Useful tokens per second 2,000 Supervised tokens 8,000 Peak memory 2,048 MB",
        "2 of 2 held-out images",
        "one image_missing 5 r0, r1, r2, …",
        "llavar-peft ask --model 'my model' --image FILE \"What is written?\"",
        "Device a CPU",
        "A note.",
        "seed: 0",
        "torch 2.9.1 cuda null",
    ):
        assert words in page.text
    assert page.text.startswith("Signs Training run Signs")


def test_each_image_is_shown_once_with_all_its_answers(run: Path) -> None:
    text = page_of(run)
    assert len(Elements(text).all("img")) == 2
    first = re.sub(r"<[^>]+>", " ", text.split("<article>")[1].split("</dl>")[0]).split()
    assert " ".join(first[:4]) == "What is written? truth"
    # The answer at the start of the second stage equals the one at the end of the first and is left out.
    assert [word for word in first if word in {"before", "one", "two", "start", "✓", "✗"}] == [
        *("before", "✗", "one"),  # the answer contains the name of the stage
        *("one", "✓", "two", "✓"),
    ]
    assert 'aria-label="wrong"' in text
    assert "2 answers in between" in text


def test_differences_in_a_wrong_answer_are_highlighted(run: Path) -> None:
    text = page_of(run)
    assert "SH<mark>A</mark>P 1<mark> one</mark>" in text
    assert "<bdi>a dog</bdi>" in text  # too different to highlight


def test_same_files_give_the_same_bytes(run: Path) -> None:
    first = write_run_page(run, title="T").read_bytes()
    assert write_run_page(run, title="T").read_bytes() == first
    assert not [path.name for path in run.iterdir() if path.name.endswith(".new")]


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    evil = sample(1, XSS, id=XSS, question=XSS, truth=XSS + "!", image=XSS)
    append(folder / "s<b>" / "metrics.jsonl", step(1, 1.0))
    append(folder / "s<b>" / "probe.jsonl", look(0, "start", 0.0, [evil, sample(2, "\x00\ud800\u202e\x1b[31m")]))
    append(folder / "s<b>" / "dropped.jsonl", {"id": XSS, "reason": XSS})
    (folder / "recipe.yaml").write_text(f"name: {XSS}", encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps({XSS: XSS}), encoding="utf-8")
    text = page_of(folder, title=XSS, extra=[(XSS, XSS)], notes=[XSS], model_dir=XSS)
    page = Elements(text)
    assert not page.all("script")
    assert not page.all("img")
    assert not page.all("b") or all(not attributes for attributes in page.all("b"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in text
    assert not set(text) & (set(map(chr, range(32))) - {"\n", "\t"})


def test_the_page_loads_nothing_from_the_network(run: Path) -> None:
    text = page_of(run)
    page = Elements(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in {"src", "href"}]
    assert addresses
    assert all(value and value.startswith("data:") for value in addresses)
    assert any("default-src 'none'" in (attributes.get("content") or "") for attributes in page.all("meta"))


@pytest.mark.slow
@pytest.mark.parametrize(("side", "count"), [(400, 40), (48, 60)])
def test_a_large_page_shows_fewer_images(tmp_path: Path, side: int, count: int) -> None:
    samples = [sample(number, "x" * 5000) for number in range(count)]
    for number in range(count):
        image(tmp_path / "s" / "probe" / f"{number}.png", number, (side, side), noise=True)
    looks = [look(at, "step", 0.0, samples) for at in range(1, 30)]
    append(tmp_path / "s" / "probe.jsonl", look(0, "start", 0.0, samples), *looks)
    append(tmp_path / "s" / "metrics.jsonl", *(step(n, 1 + n % 7) for n in range(1, 5001)))
    (tmp_path / "recipe.yaml").write_text("x: y\n" * 50_000, encoding="utf-8")
    text = page_of(tmp_path)
    assert len(text.encode()) <= MOST_BYTES
    shown = len(Elements(text).all("img"))
    assert 8 <= shown < count
    assert f"{shown} of {count} held-out images" in text
    assert "(5,000 characters)" in text


def test_a_run_that_just_started(tmp_path: Path) -> None:
    assert "Nothing has been written" in page_of(tmp_path)
    (tmp_path / "stages.json").write_text('["one", "two"]', encoding="utf-8")
    for name in ("recipe.yaml", "versions.json", "one/metrics.jsonl", "one/probe.jsonl", "one/dropped.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert "no steps yet" in page_of(tmp_path)
    append(tmp_path / "one" / "probe.jsonl", look(0, "start", 0.0, [sample(1, "x")]))
    assert "Image not found" in page_of(tmp_path)
    append(tmp_path / "one" / "metrics.jsonl", step(1, 3.0))
    text = page_of(tmp_path)
    assert "not evaluated at its end yet" in text
    assert Elements(text)


@pytest.mark.parametrize("half", [b'{"step": 41, "lo', b'{"step": 41}x', b'{"loss": "\xe2\x82', b"\x00\x00\x00\n"])
def test_an_incomplete_last_line_is_ignored(run: Path, half: bytes) -> None:
    before = page_of(run)
    for name in ("metrics.jsonl", "probe.jsonl", "dropped.jsonl"):
        with (run / "two" / name).open("ab") as file:
            file.write(half)
    assert page_of(run) == before


def test_a_malformed_line_is_reported(run: Path) -> None:
    path = run / "one" / "metrics.jsonl"
    path.write_text('{"step": 1, "lo\n' + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not valid JSON"):
        write_run_page(run)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "metrics.jsonl",
            {"step": "1", "loss": 1.0},
            r"metrics\.jsonl:41: .*Expected `int`, got `str` - at `\$\.step`",
        ),
        ("metrics.jsonl", {"step": 1}, r"metrics\.jsonl:41: .*missing required field `loss`"),
        (
            "probe.jsonl",
            look(9, "later", 0.1, []),
            r"probe\.jsonl:4: .*'later' - at `\$\.when`",
        ),
        (
            "probe.jsonl",
            look(9, "step", 0.1, [sample(1, "x", correct=1)]),
            r"Expected `bool`, got `int` - at `\$\.samples\[0\]\.correct`",
        ),
        (
            "dropped.jsonl",
            {"id": "1", "reason": None},
            r"dropped\.jsonl:\d: .*Expected `str`, got `null` - at `\$\.reason`",
        ),
    ],
)
def test_a_wrong_value_is_reported(run: Path, name: str, line: dict[str, Any], message: str) -> None:
    append(run / "one" / name, line)
    with pytest.raises(DataError, match=message):
        write_run_page(run)


@pytest.mark.parametrize("listed", ['["../one"]', '[".."]', '[""]', "[1]", '{"a": 1}'])
def test_stages_must_be_folder_names(run: Path, listed: str) -> None:
    (run / "stages.json").write_text(listed, encoding="utf-8")
    with pytest.raises(DataError, match=r"stages\.json"):
        write_run_page(run)


def test_an_incomplete_file_is_mentioned(run: Path) -> None:
    (run / "versions.json").write_text('{"torch": "2.', encoding="utf-8")
    assert "versions.json is incomplete" in page_of(run)


def test_without_a_list_stages_are_ordered_by_time(run: Path) -> None:
    (run / "stages.json").unlink()
    for stage, time in (("two", 1_000), ("one", 2_000)):
        for path in (run / stage).glob("*.jsonl"):
            os.utime(path, (time, time))
    text = page_of(run)
    assert text.index("<h2>two") < text.index("<h2>one")


def test_repeated_steps_of_a_resumed_run_count_once(run: Path) -> None:
    append(run / "two" / "metrics.jsonl", *(step(n, 0.5) for n in range(31, 46)))
    assert "Steps 85 " in Elements(page_of(run)).text


def test_dropped_records_are_counted_by_kind_over_all_ranks(run: Path) -> None:
    for rank in ("", ".rank1"):
        lines = [{"id": f"p{rank}{n}", "reason": f"image: no such file {n}.png"} for n in range(3)]
        append(run / "two" / f"dropped{rank}.jsonl", *lines)
    append(run / "two" / "dropped.jsonl", *({"id": str(n), "reason": f"kind{n}"} for n in range(20)))
    text = Elements(page_of(run)).text
    assert "two image 6 p0: no such file 0.png, …" in text
    assert "two 9 other reasons 9" in text


def test_an_image_outside_the_stage_folder_is_not_shown(run: Path) -> None:
    image(run.parent / "secret.png", 7)
    append(run / "two" / "probe.jsonl", look(50, "end", 0.1, [sample(3, "x", image="../../secret.png")]))
    text = page_of(run)
    assert len(Elements(text).all("img")) == 2
    assert "Image not found" in text


def test_one_id_with_two_images_is_two_records(run: Path) -> None:
    image(run / "two" / "probe" / "1.png", 99)
    lines = [
        look(0, "start", 0.0, [sample(1, "x", truth="other")]),
        look(40, "end", 0.0, [sample(1, "y", truth="other")]),
    ]
    (run / "two" / "probe.jsonl").unlink()
    append(run / "two" / "probe.jsonl", *lines)
    text = page_of(run)
    assert len(Elements(text).all("img")) == 3
    assert "Evaluated on different held-out images from those of the stage before: two" in text
    assert "start of two" in text


def test_a_text_only_record_without_a_blank_control(run: Path) -> None:
    lines = [look(0, "start", 0.0, [sample(9, "", image=None)], blank_exact_match=None, held_out_loss=None)]
    (run / "two" / "probe.jsonl").unlink()
    (run / "one" / "probe.jsonl").unlink()
    append(run / "one" / "probe.jsonl", *lines)
    page = Elements(page_of(run))
    assert "No image in this record" in page.text
    assert "(nothing)" in page.text
    assert "Blank images" not in page.text


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_image_mode_can_be_shown(run: Path, mode: str) -> None:
    source = Image.new("RGB", (700, 20), "navy").convert("L" if mode in {"LA", "I;16"} else "RGB").convert(mode)
    source.save(run / "one" / "probe" / "1.png", "TIFF" if mode == "CMYK" else "PNG")
    shown = Elements(page_of(run)).all("img")
    assert any(one["width"] == "360" for one in shown)


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        write_run_page(tmp_path / "none")


def test_a_page_that_cannot_be_written_leaves_nothing_behind(run: Path) -> None:
    (run / "index.html").mkdir()
    (run / "index.html" / "x").touch()
    with pytest.raises(EnvironmentFaultError, match=r"index\.html: cannot be written"):
        write_run_page(run)
    assert not list(run.glob(".index*"))


def test_the_loss_chart_notes_points_that_it_does_not_draw() -> None:
    steps = [(float(n), math.nan if n == 7 else 1.0 + n % 3) for n in range(1, 301)]
    steps[100] = (101.0, 11.0)
    chart = loss_chart(steps, [(0.0, 3.5)], 300)
    assert chart is not None
    assert chart.note == "1 above the axis, 1 not finite"
    falling = loss_chart([(float(n), 10.0 * 0.97**n) for n in range(300)], [], 300)
    assert falling is not None
    assert falling.note == "logarithmic axis"
    assert len(falling.y_ticks) <= 6
    assert loss_chart([(1.0, math.nan)], [], 1) is None
    for odd in ([(1.0, 0.0)], [(1.0, 0.0), (2.0, 5.0)], [(1.0, -3.0), (2.0, -3.0)], [(1.0, 1e30), (2.0, 1e-30)]):
        assert loss_chart(odd, [], 2)


def test_the_running_mean_is_centred() -> None:
    assert running_mean([(0, 0.0), (1, 3.0), (2, 6.0), (3, 9.0)], 3) == [(0, 1.5), (1, 3.0), (2, 6.0), (3, 7.5)]


def test_wilson_interval_matches_r() -> None:
    # Wilson 1927, as in R: prop.test(8, 10, correct = FALSE) gives 0.4901625 to 0.9433178.
    assert wilson(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0.0, 5)[0] == pytest.approx(0.0)


def test_the_pages_import_no_torch() -> None:
    code = "import sys, llavar_peft.page; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
