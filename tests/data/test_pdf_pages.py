"""Pages of PDF documents as images: their names, what is rejected, and that they are the same everywhere."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llavar_peft.cli import main
from llavar_peft.data.check_records import check_records, preflight
from llavar_peft.data.image_files import decode_image, open_image, open_images
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.pdf_pages import PdfDocument, choose_pages
from llavar_peft.data.record_store import open_records
from llavar_peft.errors import ImageError, LlavarError, MissingDependencyError
from llavar_peft.page.inline_images import embed_image, image_key
from tests.pdf_files import paragraph, pdf

pytest.importorskip("pypdfium2")

THREE = pdf(*(paragraph(f"This is page {number} of a short document.") for number in (1, 2, 3)))
ONE = pdf(paragraph("Total 12.50"))
MANUAL = Path("/usr/share/doc/libtasn1-doc/libtasn1.pdf")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    path = tmp_path / "three.pdf"
    path.write_bytes(THREE)
    return path


def _pixels(image: Image.Image) -> bytes:
    return image.mode.encode() + str(image.size).encode() + image.tobytes()


def test_a_page_is_an_image_of_200_dpi(three: Path) -> None:
    pages = [open_image(f"{three}#page={number}") for number in (1, 2, 3)]
    assert {page.size for page in pages} == {(1653, 2339)}
    assert all(0 < np.mean(np.asarray(page) < 128) < 0.05 for page in pages)
    assert len(set(map(_pixels, pages))) == 3
    assert _pixels(decode_image(THREE, "image", "2")) == _pixels(pages[1])
    assert list(open_images(three, pages="3,1-2")) == [f"{three}#page={number}" for number in (3, 1, 2)]
    assert _pixels(open_images(THREE, "sent#page=2-")["sent#page=3"]) == _pixels(pages[2])


@pytest.mark.parametrize(("size", "rendered"), [((100, 50), (1000, 500)), ((227, 567), (820, 2048)),
                                                ((3370, 2384), (4096, 2898)), ((14_400, 100), (4096, 29))])  # fmt: skip
def test_small_and_large_pages_have_a_usable_number_of_pixels(size: tuple[int, int], rendered: tuple[int, int]) -> None:
    assert decode_image(pdf(b"", size=size), "image").size == rendered


def test_the_kind_of_a_file_is_told_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "scan.jpg").write_bytes(ONE)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.pdf", "PNG")
    (tmp_path / "odd.pdf#page=2").write_bytes((tmp_path / "photo.pdf").read_bytes())
    (tmp_path / "odd.pdf").write_bytes(THREE)
    assert open_image(tmp_path / "scan.jpg").size == (1653, 2339)
    assert open_image(tmp_path / "photo.pdf").size == (30, 20)
    # A file whose name ends like that of a page is itself.
    assert open_image(tmp_path / "odd.pdf#page=2").size == (30, 20)
    assert open_image(tmp_path / "odd.pdf#page=3").size == (1653, 2339)
    with pytest.raises(ImageError, match=r"photo\.pdf#page=2: names page 2 of a file that is no PDF .*leave out"):
        open_image(tmp_path / "photo.pdf#page=2")


CUT = pdf(paragraph("A long text. " * 40))
BAD: dict[str, tuple[bytes, str]] = {
    "needs a password": (pdf(paragraph("Secret"), password="secret"), "save it without a password"),
    "damaged or has no pages": (pdf(), "get the file again"),
    "has no pages.": (b"%PDF-1.7\nnothing else\n%%EOF", "get the file again"),
    "was cut off": (CUT[: len(CUT) // 2], "get the file again"),
    "has no page 7 (it has 1)": (pdf(paragraph("x"), count=10**9), "choose one of its pages"),
    "got 1,000,000 x 1,000,000 points": (pdf(paragraph("x"), size=(1e6, 1e6)), "usual size of paper"),
    "got 0.5 x 0.5 points": (pdf(paragraph("x"), size=(0.5, 0.5)), "usual size of paper"),
    "is a PDF document of 3 pages": (THREE, "write the page's number, as in a.pdf#page=1"),
    "names 2 pages, expected one": (THREE, "as in a.pdf#page=1"),
    "has no page 0": (THREE, "choose one"),
    "names no pages (got '3-1')": (THREE, "write pages as in 1-3,7"),
}  # fmt: skip
PAGES = {"has no page 7 (it has 1)": "7", "names 2 pages, expected one": "1,3", "has no page 0": "0",
         "names no pages (got '3-1')": "3-1"}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_documents_that_cannot_be_used_are_named_by_everything(what: str, tmp_path: Path) -> None:
    data, fix = BAD[what]
    (tmp_path / "a.pdf").write_bytes(data)
    name = "a.pdf" + (f"#page={PAGES[what]}" if what in PAGES else "")
    turns = [{"from": "human", "value": "<image>\nRead it."}, {"from": "gpt", "value": "EXIT"}]
    (tmp_path / "r.json").write_text(json.dumps([{"id": "a", "image": name, "conversations": turns}]))
    (found,) = check_records(open_records(tmp_path / "r.json"), ImageRoots(tmp_path)).faults
    assert found.kind == "image_broken"
    told = [str(found)]
    for opened in (
        lambda: open_image(tmp_path / name), lambda: decode_image(data, name, PAGES.get(what))
    ):  # fmt: skip
        with pytest.raises(ImageError) as raised:
            opened()
        told.append(str(raised.value))
    for message in told:
        assert what in message
        assert f"Fix: {fix}" in message or fix in message
        assert len(message.replace(str(tmp_path), "")) < 300


def test_an_encrypted_document_without_a_password_and_one_with_10_000_pages_open(tmp_path: Path) -> None:
    assert np.asarray(decode_image(pdf(paragraph("Open"), password=""), "image")).min() < 50
    many = pdf(*[b""] * 10_000, size=(100, 100))
    assert decode_image(many, "image", "9999").size == (1000, 1000)
    with pytest.raises(ImageError, match=r"has 10,000 pages \(expected at most 20\)\. Fix: .*1-20"):
        open_images(many, "many.pdf")


def test_damaged_documents_end_in_our_errors() -> None:
    """Pages open, or an error says why not; what happens to the process that reads them does not matter."""
    whole = pdf(paragraph("Some words. " * 20), paragraph("More"), image=True, password="")
    opened = 0
    for seed in range(25):
        draw = random.Random(seed)
        data = bytearray(whole)
        for _ in range(draw.choice((1, 5, 30))):
            place = draw.randrange(20, len(data))
            data[place : place + draw.choice((0, 1, 9))] = draw.choice(
                (b"", b"9", b"1 0 R", b"<<", b"/Kids [1 0 R]", b"-99999999999", bytes((draw.randrange(256),)))
            )
        document = PdfDocument.of(bytes(data) + b"%%EOF", "a")
        assert document is not None
        with suppress(ImageError):
            opened += document.page(1, text=True).image.width > 0
    assert 3 < opened < 25


def test_a_document_that_takes_too_long_costs_only_itself() -> None:
    slow = PdfDocument.of(pdf(b"/F1 9 Tf BT " + b"(long) Tj 0 0 m 99 99 l S " * 400_000), "slow.pdf", seconds=0.05)
    assert slow is not None
    with pytest.raises(ImageError, match=r"slow\.pdf: page 1 of the PDF document cannot be read within 0\.05 s"):
        slow.page(1)
    assert decode_image(ONE, "image").width == 1653


def _render_in_fork(path: str, answers: Any) -> None:
    answers.put(_pixels(open_image(path)))


def test_threads_and_forked_processes_get_the_same_pixels(three: Path) -> None:
    names = [f"{three}#page={number}" for number in (1, 2, 3)]
    expected = [_pixels(open_image(name)) for name in names]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(_pixels, pool.map(open_image, names * 3))) == expected * 3
    if not hasattr(os, "fork"):
        return
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_render_in_fork, args=(names[1], answers))
    process.start()
    assert answers.get(timeout=60) == expected[1]
    process.join()
    assert _pixels(open_image(names[0])) == expected[0]  # its end did not end ours


def test_pages_are_found_in_the_image_folders_and_never_outside(three: Path, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", three
    inside.mkdir()
    (inside / "link.pdf").symlink_to(outside)
    (inside / "own.pdf").write_bytes(THREE)
    roots = ImageRoots(inside)
    assert roots.resolve("own.pdf#page=2") == inside / "own.pdf#page=2"
    assert roots.open("own.pdf#page=2").size == (1653, 2339)
    for name in ("link.pdf#page=2", "../three.pdf#page=2", f"{outside}#page=2"):
        with pytest.raises(ImageError, match="leads outside the image folders"):
            roots.resolve(name)
        assert roots.leads_outside(name)
    with pytest.raises(ImageError, match=r"own\.pdf is meant, correct the path"):
        roots.resolve("Own.pdf#page=2")


def test_records_of_pages_are_checked_and_shown(three: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nRead it."}, {"from": "gpt", "value": "EXIT"}]
    names = [f"three.pdf#page={number}" for number in (1, 2, 3)] * 40
    records = [{"id": str(place), "image": name, "conversations": turns} for place, name in enumerate(names)]
    (tmp_path / "r.json").write_text(json.dumps(records))
    store, roots = open_records(tmp_path / "r.json"), ImageRoots(tmp_path)
    assert preflight(store, roots) == []
    report = check_records(store, roots)
    assert (report.clean, report.images_opened) == (True, 3)
    assert embed_image(tmp_path, names[0]) is not None
    assert embed_image(tmp_path, "three.pdf") is None  # which of its pages?
    keys = {image_key(tmp_path, name) for name in names}
    assert len(keys) == 3
    assert "" not in keys


def test_pages_of_embedded_documents_open_and_are_converted(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"data:application/pdf;base64,{base64.b64encode(THREE).decode()}"
    turns = [{"from": "human", "value": "<image>\nRead it."}, {"from": "gpt", "value": "EXIT"}]
    images = (f"{url}#page=2", f"{url}#page=3", url)
    records = [{"id": str(place), "image": image, "conversations": turns} for place, image in enumerate(images)]
    (tmp_path / "r.json").write_text(json.dumps(records))
    (fault,) = check_records(open_records(tmp_path / "r.json"), ImageRoots(tmp_path)).faults
    assert (fault.index, fault.kind) == (2, "image_broken")
    (tmp_path / "good.json").write_text(json.dumps(records[:2]))
    out = tmp_path / "out.json"
    command = ["data", "convert", str(tmp_path / "good.json"), "--out", str(out), "--images", str(tmp_path / "files")]
    assert main(command) == 0, capsys.readouterr().err
    first, second = (record["image"] for record in json.loads(out.read_text("utf-8")))
    assert (first[-7:], second[-7:]) == ("#page=2", "#page=3")
    assert first[:-7] == second[:-7]
    assert first.endswith(".pdf#page=2")
    assert _pixels(ImageRoots(tmp_path / "files").open(second)) == _pixels(open_image(f"{three}#page=3"))


def test_without_pypdfium2_the_command_that_installs_it_is_named(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find: Callable[..., Any] = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "pypdfium2" else find(name))
    turns = [{"from": "human", "value": "<image>\nRead it."}, {"from": "gpt", "value": "EXIT"}]
    (tmp_path / "r.json").write_text(json.dumps([{"id": "a", "image": "three.pdf#page=1", "conversations": turns}]))
    with pytest.raises(MissingDependencyError, match=r"r\.json"):
        preflight(open_records(tmp_path / "r.json"), ImageRoots(tmp_path))
    assert main(["data", "check", str(tmp_path / "r.json"), "--images", str(tmp_path)]) == 3
    told = capsys.readouterr().err
    assert "PDF documents need the package pypdfium2" in told
    assert "Fix: pip install 'llavar-peft[pdf]'." in told


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(None, [1, 2, 3, 4, 5]), ("1-3,5", [1, 2, 3, 5]), ("4-", [4, 5]), ("2,1-3", [2, 1, 3]), (" 2 , 4", [2, 4])],
)
def test_choosing_pages(chosen: str | None, expected: list[int]) -> None:
    assert choose_pages(chosen, 5, "a.pdf") == expected


@pytest.mark.parametrize("chosen", ["", "x", "1,", "-3", "0", "3-2", "6", "1-6", "1-999999999", "9" * 20, "1.5", "٣"])
def test_what_chooses_no_pages_is_rejected(chosen: str) -> None:
    with pytest.raises(LlavarError, match=r"^a\.pdf: (names no pages|has 5 pages)"):
        choose_pages(chosen, 5, "a.pdf")


def test_pages_of_an_installed_manual_open() -> None:
    if not MANUAL.is_file():
        pytest.skip(f"the manual of libtasn1 is not at {MANUAL}")
    pages = open_images(MANUAL, pages="1-10")
    assert list(pages) == [f"{MANUAL}#page={number}" for number in range(1, 11)]
    assert {page.size for page in pages.values()} == {(1700, 2200)}
