"""Questions about pages of PDF documents: ``ask``, ``chat``, ``generate`` and the Python API give the same answers."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from llavar_peft import Chat, cli
from llavar_peft.data.image_files import open_images
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.training_dataset import TrainingDataset
from llavar_peft.errors import DataError, ImageError
from llavar_peft.inference.engine import Engine
from tests.pdf_files import paragraph, pdf

pytest.importorskip("pypdfium2")

GREEDY = {"temperature": 0.0, "max_new_tokens": 6}
OPTIONS = ("--greedy", "--max-new-tokens", "6")
THREE = pdf(*(paragraph(f"Page {number} of a short document. " * number) for number in (1, 2, 3)))
MANUAL = Path("/usr/share/doc/libtasn1-doc/libtasn1.pdf")


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "three.pdf"
    path.write_bytes(THREE)
    return path


@pytest.fixture(scope="module")
def chat(engine: Engine) -> Chat:
    return Chat(engine)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_a_path_names_one_page(chat: Chat, document: Path) -> None:
    pages = list(open_images(document).values())
    assert chat.ask(f"{document}#page=2", "Read.", **GREEDY) == chat.ask(pages[1], "Read.", **GREEDY)
    with pytest.raises(ImageError, match=r"is a PDF document of 3 pages.*as in three\.pdf#page=1"):
        chat.ask(document, "Read.", **GREEDY)


def test_ask(chat: Chat, checkpoint: Path, document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = list(open_images(document).values())
    ask = ("ask", "--model", checkpoint, "--image")
    assert run(*ask, document, *OPTIONS, "Read.") == 0
    assert capsys.readouterr().out == chat.ask(pages, "Read.", **GREEDY) + "\n"
    assert run(*ask, document, "--pages", "3,1", *OPTIONS, "Read.", "--json", "--each-page") == 0
    expected = [{"image": f"{document}#page={number}", "answer": chat.ask(pages[number - 1], "Read.", **GREEDY)}
                for number in (3, 1)]  # fmt: skip
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pages", "4"), "has 3 pages (got page 4). Fix: choose pages that it has."),
        (("--pages", "one"), "names no pages (got 'one'). Fix: write pages as in 1-3,7."),
        (("--max-pages", "2"), "has 3 pages (expected at most 2). Fix: choose some of them, for example 1-2."),
        (("--image", __file__), "is not an image"),
        (("--image", "{one}#page=2", "--pages", "1"), "--pages: got '1' for "),
    ],
)
def test_ask_rejects_before_it_loads_the_model(
    options: tuple[str, ...], message: str, document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [option.format(one=document) for option in options]
    assert run("ask", "--model", tmp_path, "--image", document, *named, "Read.") == 2
    assert message in capsys.readouterr().err


def test_more_images_than_the_context_holds_are_rejected_with_a_number(chat: Chat, document: Path) -> None:
    page = open_images(document, pages="1")[f"{document}#page=1"]
    with pytest.raises(DataError, match=r"Fix: show at most \d+ images or pages \(got 16\), ") as raised:
        chat.ask([page] * 16, "Read.", **GREEDY)
    fitting = int(str(raised.value).partition("show at most ")[2].split()[0])
    with pytest.raises(DataError, match=f"show at most {fitting} images"):
        chat.ask([page] * (fitting + 1), "Read.", **GREEDY)
    chat.ask([page] * fitting, "Read.", temperature=0.0, max_new_tokens=1)


def test_chat_and_generate(
    chat: Chat, checkpoint: Path, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pages = list(open_images(document).values())
    lines = ["Read.", f"/image {document}#page=3", "And this?", f"/image {document}#page=9"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert run("chat", "--model", checkpoint, "--image", document, "--pages", "1-2", *OPTIONS) == 0
    talk = chat.conversation(pages[:2])
    expected = [talk.send("Read.", **GREEDY), talk.send("And this?", pages[2], **GREEDY)]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == expected
    assert "has no page 9 (it has 3)" in captured.err or "has 3 pages (got page 9)" in captured.err

    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    rows = [{"question_id": number, "image": f"three.pdf#page={number}", "text": "Read."} for number in (1, 2, 3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate = ("generate", "--model", checkpoint, "--questions", questions, "--answers", answers, *OPTIONS)
    assert run(*generate, "--images", document.parent) == 0
    written = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    assert written == [chat.ask(page, "Read.", **GREEDY, image_mode=None) for page in pages]
    questions.write_text(json.dumps({**rows[0], "image": "three.pdf"}) + "\n")
    answers.unlink()
    assert run(*generate, "--images", document.parent) == 2
    assert "three.pdf: is a PDF document of 3 pages, expected one page" in capsys.readouterr().err


def test_training_sees_the_pixels_of_the_rendered_page(engine: Engine, document: Path, tmp_path: Path) -> None:
    shutil.copy(document, tmp_path / "three.pdf")
    open_images(document, pages="2")[f"{document}#page=2"].save(tmp_path / "two.png")
    turns = [{"from": "human", "value": "<image>\nRead it."}, {"from": "gpt", "value": "EXIT"}]
    names = ("three.pdf#page=2", "two.png", "three.pdf", "three.pdf#page=4")
    records = [{"id": name, "image": name, "conversations": turns} for name in names]
    data = TrainingDataset(records, range(4), ImageRoots(tmp_path), engine.processor, max_length=512)  # type: ignore[arg-type]
    page, image, several, missing = (data[place] for place in range(4))
    assert page.fault is None
    assert torch.equal(page.pixels[0], image.pixels[0])
    assert "is a PDF document of 3 pages" in str(several.fault)
    assert "has no page 4 (it has 3)" in str(missing.fault)


def test_ten_pages_of_an_installed_manual(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not MANUAL.is_file():
        pytest.skip(f"the manual of libtasn1 is not at {MANUAL}")
    asked = ("ask", "--model", checkpoint, "--image", MANUAL, "--pages", "5-14", "--each-page", *OPTIONS, "Read.")
    assert run(*asked) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
