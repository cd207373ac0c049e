"""Records built from synthetic documents, photographs and a manual, compared with their true text."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from rapidfuzz.distance import Levenshtein

from llavar_peft.cli import main
from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.synth_settings import SynthKind, SynthSettings
from llavar_peft.datagen.synth.write_synthetic import SynthResult, write_synthetic

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> SynthResult:
    settings = SynthSettings(width=800, distort="light", seed=9)
    return write_synthetic(tmp_path_factory.mktemp("drawn"), 6, settings)


def error_rates(drawn: SynthResult, records: Path) -> dict[str, float]:
    """Return the character error rate of each record, without white space, including the reading order."""
    lines = drawn.truth.read_text("utf-8").splitlines()
    truths = {truth["image"]: truth["text"] for truth in map(json.loads, lines)}
    return {
        record["image"]: error_rate(record["conversations"][1]["value"], truths[record["image"]], r"\s+")
        for record in json.loads(records.read_text("utf-8"))
    }


def error_rate(read: str, there: str, aside: str) -> float:
    """Return the character error rate without what ``aside`` matches."""
    read, there = (re.sub(aside, "", text) for text in (read, there))
    return Levenshtein.distance(read, there) / len(there)


def _need(engine: str) -> None:
    if engine == "rapidocr":
        pytest.importorskip("rapidocr")
        pytest.importorskip("onnxruntime")
    elif shutil.which("tesseract") is None:
        pytest.skip("the program tesseract is not installed")


# Minimum number of records from 6 slightly turned and shadowed images, mean and maximum character error rate.
# Measured: RapidOCR 6, 0 and 0; Tesseract 6, 0.006 and 0.034.
@pytest.mark.parametrize(
    ("engine", "least", "mean", "largest"), [("rapidocr", 5, 0.02, 0.1), ("tesseract", 5, 0.05, 0.2)]
)
def test_documents_become_records(
    engine: str, least: int, mean: float, largest: float, drawn: SynthResult, tmp_path: Path
) -> None:
    _need(engine)
    out = tmp_path / "records.json"
    options = ["--engine", engine, "--short-edge", "0", "--workers", "2"]
    assert main(["ocr", "build", str(drawn.images), "--out", str(out), *options]) == 0
    assert main(["data", "check", str(out), "--images", str(drawn.images)]) == 0
    rates = error_rates(drawn, out)
    assert len(rates) >= least
    assert sum(rates.values()) / len(rates) <= mean, rates
    assert max(rates.values()) <= largest, rates


def test_photographs_and_scans(shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    images = shared_dir / "golden/images/inputs"
    if not images.is_dir():
        pytest.skip(f"no photographs at {images}")
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    for image in sorted(images.iterdir())[::2]:  # every other one; all of them are opened in tests/data
        shutil.copy(image, chosen)
    out = tmp_path / "records.json"
    assert main(["ocr", "build", str(chosen), "--out", str(out), "--workers", "1"]) == 0
    assert main(["data", "check", str(out), "--images", str(chosen)]) == 0
    report = json.loads((tmp_path / "records.report.json").read_text("utf-8"))
    assert report["images"] >= 7
    assert report["kept"] + len(report["drops"]) == report["images"]
    assert not {drop["reason"] for drop in report["drops"]} & {"broken_image", "engine_failed"}


PHOTOGRAPH = (
    "GT Georgia Tech College of Engineering H. Milton Stewart School of Industrial and Systems Engineering No. 1 "
    "GRADUATE PROGRAM Georgia Tech's H. Milton Stewart School of Industrial and Systems Engineering is the best in the "
    "nation according to U.S. News & World Report for 33 CONSECUTIVE YEARS"
)
"""All text on ``real_gatech_post.jpg``, transcribed by a person."""


# Measured: 0.016; 0.135 by Tesseract, which misses the emblem and the smallest line, 8 pixels high.
@pytest.mark.parametrize(("engine", "largest"), [("rapidocr", 0.04), ("tesseract", 0.18)])
def test_a_photograph_is_read_to_the_letter(engine: str, largest: float, shared_dir: Path, tmp_path: Path) -> None:
    _need(engine)
    photograph = shared_dir / "golden/images/inputs/real_gatech_post.jpg"
    if not photograph.is_file():
        pytest.skip(f"no photograph at {photograph}")
    (tmp_path / "images").mkdir()
    shutil.copy(photograph, tmp_path / "images")
    options = ["--engine", engine, "--profile", "page", "--workers", "1"]
    assert main(["ocr", "build", str(tmp_path / "images"), "--out", str(tmp_path / "records.json"), *options]) == 0
    (record,) = json.loads((tmp_path / "records.json").read_text("utf-8"))
    assert error_rate(record["conversations"][1]["value"], PHOTOGRAPH, r"\s+") <= largest, record


MANUAL = Path("/usr/share/doc/libtasn1-doc/libtasn1.pdf")
"""From Debian's package libtasn1-doc; its text is known, so that bounds can be tight."""


def _pages(folder: Path, count: int) -> dict[str, str]:
    """Render pages of the manual and return their text in the PDF."""
    pdfium = pytest.importorskip("pypdfium2")
    texts: dict[str, str] = {}
    with pdfium.PdfDocument(MANUAL) as document:
        for number in range(len(document)):
            page = document[number]
            text = page.get_textpage().get_text_bounded()
            # Pages of running text: neither titles nor tables of contents.
            if 800 <= len(text) <= 2500 and ". . ." not in text and text.isascii():
                name = f"{MANUAL.stem}_{number:03}.png"
                page.render(scale=150 / 72).to_pil().convert("RGB").save(folder / name)
                texts[name] = text
            if len(texts) == count:
                break
    return texts


# Minimum share of the PDF's words (measured on ten pages by RapidOCR: 0.992), and maximum character error rate of the
# page with the most text. The other page, a table of options, has none, because a PDF may store columns differently.
@pytest.mark.parametrize(("engine", "least", "largest"), [("rapidocr", 0.98, 0.05), ("tesseract", 0.9, 0.05)])
def test_pages_of_an_installed_manual(engine: str, least: float, largest: float, tmp_path: Path) -> None:
    _need(engine)
    if not MANUAL.is_file():
        pytest.skip(f"the manual of libtasn1 is not at {MANUAL}")
    images = tmp_path / "pages"
    images.mkdir()
    texts = _pages(images, 2)
    assert len(texts) == 2
    out = tmp_path / "records.json"
    assert main(["ocr", "build", str(images), "--out", str(out), "--workers", "1", "--engine", engine]) == 0
    assert main(["data", "check", str(out), "--images", str(images)]) == 0
    report = json.loads((tmp_path / "records.report.json").read_text("utf-8"))
    assert report["profiles"] == {"page": 2}
    assert report["agreement"]["images"] == 1
    assert report["agreement"]["error_rate"] < 0.03
    said = {record["image"]: record["conversations"][1]["value"] for record in json.loads(out.read_text("utf-8"))}
    read, there = (Counter[str](), Counter[str]())
    for image, text in texts.items():
        read += _words(said[image])
        there += _words(text)
    assert (read & there).total() >= least * there.total(), there - read
    prose = max(texts, key=lambda name: len(texts[name]))
    # A PDF lacks the hyphens at line ends, and the underscores that it draws as rules.
    assert error_rate(said[prose], texts[prose], r"[\s_-]+") <= largest, said[prose]


def _words(text: str) -> Counter[str]:
    """Return words, in any order, and whole where a line ends within one."""
    return Counter(re.findall(r"[^\W_]+", re.sub(r"\x02\s*|-\n", "", text)))


def test_receipts_and_signs_are_read_by_their_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each row of a receipt is a line, with its amount. A small one is read badly if not enlarged, with a warning."""
    _need("rapidocr")
    kinds: tuple[SynthKind, ...] = ("receipts", "signs", "receipts")
    receipt, sign, other = (
        draw_page(SynthSettings(kinds=(kind,), seed=5, distort="light", width=600), number)
        for number, kind in enumerate(kinds)
    )
    rows = re.findall(r"[^\W\d_]+ \d+\.\d\d(?=\s|$)", receipt.transcript)
    small = tmp_path / "few" / "small.png"
    small.parent.mkdir()
    other.image.resize((other.image.width // 4, other.image.height // 4)).save(small)
    out = tmp_path / "out" / "records.json"
    options = ["--workers", "1", "--keep-duplicates", "--min-confidence", "0"]
    assert main(["ocr", "build", str(tmp_path / "few"), "--out", str(out), "--short-edge", "0", *options]) == 0
    report = json.loads(out.with_suffix(".report.json").read_text("utf-8"))
    assert report["agreement"]["error_rate"] > 0.03
    assert "characters may be wrong" in capsys.readouterr().err
    assert "Uncertain text" in out.with_suffix(".report.html").read_text("utf-8")
    small.unlink()
    receipt.image.save(tmp_path / "receipt.png")
    sign.image.save(tmp_path / "sign.png")
    assert main(["ocr", "build", str(tmp_path), "--out", str(out.with_name("all.json")), *options]) == 0
    assert "profile auto (1 as page, 1 as scene)" in capsys.readouterr().out
    record, _ = json.loads(out.with_name("all.json").read_text("utf-8"))
    lines = record["conversations"][1]["value"].split("\n")
    assert len(rows) > 3
    assert [row for row in rows if not any(line.endswith(row) for line in lines)] == []
