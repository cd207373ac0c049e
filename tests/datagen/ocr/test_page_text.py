"""The own text of pages of PDF documents: where it is used, and that it is exact."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from llavar_peft.cli import main
from llavar_peft.data.image_files import open_image
from llavar_peft.data.pdf_pages import PdfDocument
from llavar_peft.datagen.ocr.ocr_lines import OcrLine
from llavar_peft.datagen.ocr.ocr_quality import transcribe
from llavar_peft.datagen.ocr.page_text import lines_of_page
from tests.pdf_files import paragraph, pdf, text_at

pytest.importorskip("pypdfium2")

TEXT = "The quick brown fox jumps over the lazy dog, and the invoice of 12 March is due within thirty days of receipt. "
FULL_IMAGE = b"q 595 0 0 842 0 0 cm /Im1 Do Q\n"
MANUAL = Path("/usr/share/doc/libtasn1-doc/libtasn1.pdf")


def _read(data: bytes) -> tuple[tuple[OcrLine, ...], str | None]:
    document = PdfDocument.of(data, "a.pdf")
    assert document is not None
    return lines_of_page(document.page(1, text=True))


def _map(pairs: Sequence[tuple[int, int]]) -> bytes:
    """Return a font's map from codes to characters."""
    rows = b"".join(b"<%02X> <%04X>\n" % pair for pair in pairs)
    return (
        b"begincmap 1 begincodespacerange <00> <FF> endcodespacerange %d beginbfchar\n%s endbfchar endcmap"
        % (len(pairs), rows)
    )  # fmt: skip


def test_text_is_exact_and_in_reading_order() -> None:
    lines, why_not = _read(pdf(paragraph(TEXT * 2)))
    assert why_not is None
    assert " ".join(line.text for line in lines) == " ".join((TEXT * 2).split())
    assert transcribe(lines) == " ".join((TEXT * 2).split())


@pytest.mark.parametrize("entries", [b"", b"/Rotate 90", b"/Rotate 180", b"/Rotate 270", b"/CropBox [50 600 500 800]",
                                     b"/CropBox [50 600 500 800] /Rotate 90"])  # fmt: skip
def test_the_boxes_are_where_the_text_is_seen(entries: bytes) -> None:
    document = PdfDocument.of(pdf(paragraph(TEXT), page=entries), "a.pdf")
    assert document is not None
    page = document.page(1, text=True)
    grey = page.image.convert("L")
    for line in lines_of_page(page)[0]:
        box = [f([point[axis] for point in line.polygon]) for f in (min, max) for axis in (0, 1)]
        inside = tuple(map(round, box))
        assert grey.crop(inside).getextrema()[0] < 50
        grey.paste(255, inside)
    assert grey.getextrema()[0] > 200  # nothing is left outside the boxes


def test_ligatures_and_bullets_are_plain_characters() -> None:
    data = pdf(
        text_at([(60, 700, "* of~ce 1")]), to_unicode=_map([(42, 0xF0B7), (126, 0xFB03), (111, 111), (102, 102)])
    )
    assert [line.text for line in _read(data)[0]] == ["\u2022 offfice 1"]


def test_rows_of_a_table_stay_together_and_columns_apart() -> None:
    table = text_at([(60, 700, "Coffee"), (200, 700, "3.50"), (60, 680, "Total"), (200, 680, "3.50")])
    assert [line.text for line in _read(pdf(table))[0]] == ["Coffee 3.50", "Total 3.50"]
    columns = text_at([(60, 700, "Left one"), (360, 700, "Right one"), (60, 686, "left two"), (360, 686, "right two")])
    assert sorted(line.text for line in _read(pdf(columns))[0]) == ["Left one", "Right one", "left two", "right two"]


def test_what_was_typed_into_a_form_is_text_and_is_seen() -> None:
    document = PdfDocument.of(pdf(text_at([(60, 530, "Name")]), typed="Ada Lovelace"), "a.pdf")
    assert document is not None
    page = document.page(1, text=True)
    lines = lines_of_page(page)[0]
    assert [line.text for line in lines] == ["Name", "Ada Lovelace"]
    (left, top), _, (right, bottom), _ = lines[1].polygon
    assert page.image.convert("L").crop((int(left), int(top), int(right), int(bottom))).getextrema()[0] < 50


def test_text_along_the_margin_is_one_line() -> None:
    (line,) = _read(pdf(b"BT /F1 12 Tf 0 1 -1 0 100 100 Tm (Upwards along the margin) Tj ET"))[0]
    assert line.text == "Upwards along the margin"
    first, second = line.polygon[:2]
    assert first[1] > second[1]
    assert abs(first[0] - second[0]) < 1


PLAIN = paragraph(TEXT * 2)
SHUFFLED = list(range(97, 123))
random.Random(1).shuffle(SHUFFLED)
LAYER = text_at([(60, 780 - 20 * row, f"Row {row} that a scanner's program found") for row in range(20)], mode=3)
PAGES: dict[str, tuple[bytes, str | None]] = {
    "scan with an invisible layer": (pdf(FULL_IMAGE + LAYER, image=True), None),
    "table of contents": (pdf(text_at([(60, 700 - 20 * n, f"Chapter {n} {'. ' * 40}{n}") for n in range(9)])), None),
    "figures": (pdf(text_at([(60, 700 - 20 * n, f"{n * 37}.50  {n * 11}.00") for n in range(9)])), None),
    "text beside a photograph": (pdf(b"q 300 0 0 300 60 100 cm /Im1 Do Q\n" + PLAIN, image=True), None),
    "Polish": (pdf(paragraph("Wszyscy ludzie rodza sie wolni i rowni pod wzgledem swej godnosci i praw. " * 2)), None),
    "scan": (pdf(FULL_IMAGE, image=True), "no text"),
    "scan with a stamp": (
        pdf(FULL_IMAGE + text_at([(60, 20, "Scanned with a telephone")], 8), image=True),
        "an image with little text on it",
    ),
    "page number": (pdf(text_at([(300, 20, "1 / 3")])), "no text"),
    "private": (pdf(PLAIN, to_unicode=_map([(c, 0xE000 + c) for c in range(33, 127)])), "unknown characters"),
    "exchanged letters": (pdf(PLAIN, to_unicode=_map(list(zip(range(97, 123), SHUFFLED, strict=True)))),
                          "letters that form no words"),
    "signs": (pdf(PLAIN, to_unicode=_map([(c, 33 + c % 14) for c in range(33, 127)])), "more signs than letters"),
    "very much": (
        pdf(text_at([(60, 800 - 7 * n, "small print " * 19) for n in range(110)], 4)),
        "more text than a page can show",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_own_text_is_used_where_it_can_be_trusted(name: str) -> None:
    data, expected = PAGES[name]
    lines, why_not = _read(data)
    assert why_not == expected
    assert bool(lines) == (expected is None)


def test_a_folder_with_documents_becomes_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    folder, out = tmp_path / "in", tmp_path / "o.json"
    (folder / "more").mkdir(parents=True)
    texts = [
        "Invoice of Smith and Sons",
        "-",
        "Terms of delivery",
        "A warranty of two years",
        "Opening hours",
        "-",
        "-",
    ]
    (folder / "more" / "invoices.PDF").write_bytes(pdf(*map(paragraph, texts)))
    (folder / "scan.pdf").write_bytes(pdf(FULL_IMAGE, image=True))
    (folder / "secret.pdf").write_bytes(pdf(paragraph("x"), password="secret"))
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    monkeypatch.setattr("llavar_peft.datagen.ocr.ocr_engines.RapidOcr.read", lambda *_: ())
    command = ["ocr", "build", str(folder), "--out", str(out), "--workers", "1"]
    assert main([*command, "--pages", "1,3-", "--max-pages", "4"]) == 0
    records, report = (json.loads(path.read_text("utf-8")) for path in (out, out.with_suffix(".report.json")))
    names = [f"more/invoices.PDF#page={number}" for number in (1, 3, 4, 5)]
    assert [record["image"] for record in records] == names
    assert [record["conversations"][1]["value"] for record in records] == [texts[number] for number in (0, 2, 3, 4)]
    assert {(record["image_width"], record["image_height"]) for record in records} == {(1653, 2339)}
    assert report["pages"] == {"own text": 4, "no text": 1}
    drops = {drop["path"]: (drop["reason"], drop["detail"]) for drop in report["drops"]}
    assert drops["scan.pdf#page=1"][0] == "no_text"
    assert drops["more/invoices.PDF"] == ("pages_left_out", "2 of 7 pages; the limit is 4")
    assert "needs a password" in drops["secret.pdf"][1]
    assert "pip install pillow-heif" in drops["photo.heic"][1]
    assert "5  4 by their own text; read as images: 1 no text" in capsys.readouterr().out
    assert main(["data", "check", str(out), "--images", str(folder)]) == 0
    # Nothing is read again, and what the engine is asked to read is no longer its own text.
    assert main([*command, "--pages", "1,3-", "--max-pages", "4"]) == 0
    assert "7 read by an earlier run" in capsys.readouterr().out
    assert main([*command, "--no-page-text"]) == 2
    assert main([*command, "--pages", "three"]) == 2
    told = capsys.readouterr().err
    assert "pages: names no pages (got 'three'). Fix: write pages as in 1-3,7." in told


def test_a_folder_without_a_usable_image_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    assert main(["ocr", "build", str(tmp_path / "in"), "--out", str(tmp_path / "o.json"), "--workers", "1"]) == 2
    assert "IMG_1.HEIC: is a HEIC photograph" in capsys.readouterr().err


def test_pages_of_an_installed_manual(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    if not MANUAL.is_file():
        pytest.skip(f"the manual of libtasn1 is not at {MANUAL}")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/manual.pdf").write_bytes(MANUAL.read_bytes())
    out = tmp_path / "o.json"
    assert main(["ocr", "build", str(tmp_path / "in"), "--out", str(out), "--workers", "1", "--pages", "5-14"]) == 0
    records = json.loads(out.read_text("utf-8"))
    assert len(records) == 10
    assert json.loads(out.with_suffix(".report.json").read_text("utf-8"))["pages"] == {"own text": 10}
    said = {record["image"]: record["conversations"][1]["value"] for record in records}
    assert "int asn1_parser2tree (const char * file, asn1 node *" in said["manual.pdf#page=11"]
    assert open_image(tmp_path / "in/manual.pdf#page=11").size == (1700, 2200)
