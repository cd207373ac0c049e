"""Rows of a question and its answer: CSV and TSV files, and the columns in which data sets are published."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest

from llavar_peft.cli import main
from llavar_peft.data.check_records import check_records, preflight
from llavar_peft.data.hub_sources import TableSelection
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import RecordStore, open_records, parse_record
from llavar_peft.data.training_dataset import image_count, text_tokens
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.types import Conversation, EmbeddedImage
from tests.data.test_record_tables import png

PLAIN = 'image,question,answer\na.png,"What, ""exactly""?\nTwo lines",23.80\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(store: RecordStore) -> list[Conversation]:
    return [parse_record(store[index], store.where(index)) for index in range(len(store))]


def pairs(conversation: Conversation) -> list[tuple[str, str]]:
    """Return the questions, without the images' places, and the answers."""
    texts = [turn.text.replace("<image>", "").strip() for turn in conversation.turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


CSV_FORMS: dict[str, tuple[str, bytes]] = {
    "plain": ("a.csv", PLAIN.encode()),
    "byte order mark": ("a.csv", PLAIN.encode("utf-8-sig")),
    "semicolons": ("a.csv", PLAIN.replace(",", ";").replace("What;", "What,").encode()),
    "Excel": ("a.csv", ("sep=;\n" + PLAIN.replace(",", ";").replace("What;", "What,")).encode("utf-8-sig")),
    "Excel, UTF-16": ("a.csv", PLAIN.replace(",", "\t").replace("What\t", "What,").encode("utf-16")),
    "tabs": ("a.tsv", PLAIN.replace(",", "\t").replace("What\t", "What,").encode()),
    "names": ("A.CSV", PLAIN.replace("image,question,answer", "Image Path, Query ,ANSWERS").encode()),
    "index column": ("a.csv", b',image,question,answer\n0,a.png,"What, ""exactly""?\nTwo lines",23.80,\n'),
    "blank lines": ("a.csv", b"\n" + PLAIN.replace("answer\n", "answer\n\n").encode() + b"\n\n"),
    "list of answers": (
        "a.csv", PLAIN.replace("answer", "answers").replace("23.80", "\"['23.8', '23.80', '23.80']\"").encode()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CSV_FORMS)
def test_a_table_of_text_is_read_as_people_have_it(name: str, tmp_path: Path) -> None:
    file, data = CSV_FORMS[name]
    (tmp_path / file).write_bytes(data)
    store = open_records(tmp_path / file)
    (conversation,) = read(store)
    assert conversation.images == ("a.png",)
    assert conversation.id == "0"
    assert pairs(conversation) == [('What, "exactly"?\nTwo lines', "23.80")]
    assert pickle.loads(pickle.dumps(store))[0] == store[0]


def test_cells_are_texts_as_they_stand(tmp_path: Path) -> None:
    answers = ["007", "NA", "null", "TRUE", "1e5", "[illegible]", " 5 ", "3,50"]
    lines = ["id,image,question,answers", *(f'r{n},a.png,Read {n}.,"{one}"' for n, one in enumerate(answers))]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\nlast,,Without image?,yes\nr9,a.png,Unanswered?\n")
    *first, text_only, unanswered = read(open_records(tmp_path / "a.csv"))
    assert [one.turns[1].text for one in first] == answers
    assert [one.id for one in first] == [f"r{number}" for number in range(len(answers))]
    assert (text_only.images, text_only.turns[0].text) == ((), "Without image?")
    assert len(unanswered.turns) == 1
    (fault,) = preflight(open_records(tmp_path / "a.csv"), ImageRoots([_images(tmp_path)]))
    assert (fault.kind, fault.where) == ("no_answer", f"{tmp_path / 'a.csv'}:9")


def _images(folder: Path, *names: str) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for name in names or ("a.png",):
        (folder / "images" / name).write_bytes(png())
    return folder / "images"


FAULTY: dict[str, tuple[bytes, str, str]] = {
    "no question": (b"image,frage,answer\na.png,F,A\n", ": has no 'question'", "--columns question=frage"),
    "no answer": (b"image,question,antwort\na.png,F,A\n", ": has no 'answer'", "columns: {answer: antwort}"),
    "neither": (b"bild,frage\na.png,F\n", "(got 'bild', 'frage')", "--columns question=NAME"),
    "no image": (b"scan,question,answer\nb/a.PNG,F,A\n", ": 'scan' seems to be the image", "--columns image=scan"),
    "NUL": (b"image,question,answer\na.png,F,A\na.png,F\0,A\n", ":1: contains a NUL", "UTF-8"),
    "encoding": ("image,question,answer\na.png,Straße,A\n".encode("cp1252"), "line 2 is not UTF-8", "iconv -f CP1252"),
    "half of UTF-16": ("image,question,answer\na.png,F,A\n".encode("utf-16")[:-1], "is not UTF-16", "as UTF-8"),
    "long cell": (b"image,question,answer\na.png," + b"x" * 2**24 + b"xx,A\n", ":0: has a line of more", "shorten"),
    "cells": (b"image,question,answer\na.png,F,A\na.png,F,A,B,C\n", ":1: has 5 cells, expected 3", "in quotes"),
    "open quote": (b'image,question,answer\na.png,"F,A\na.png,F,A\n', ":0: has a cell that begins with", "double the"),
    "inner quote": (b'image,question,answer\na.png,"F"G,A\n', ":0: is no row of a table", "double the quotes"),
    "twice": (b"image,question,question\na.png,F,A\n", "has the column 'question' twice", "rename or remove"),
    "empty": (b" \n", "the file is empty", "a header and at least one row"),
    "only a header": (b"image,question,answer\n", "no records", "at least one record"),
    "spreadsheet": (b"PK\x03\x04" + bytes(99), "is a ZIP archive or an Office file", "export it as text"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_table_is_named_with_its_row_and_a_fix(name: str, tmp_path: Path) -> None:
    data, what, fix = FAULTY[name]
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(DataError) as raised:
        open_records(path)
    assert str(raised.value).startswith(str(path))
    assert what in str(raised.value)
    assert fix in str(raised.value).partition("Fix: ")[2]
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(path))
    assert list(tmp_path.glob("cache/**/.*.part")) == []


def test_a_folder_of_csv_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/b.csv").write_text(PLAIN)
    with pytest.raises(DataError, match=r"holds no records.*give the files .*, such as .*b\.csv"):
        open_records(tmp_path / "data")


def test_a_row_is_named_by_its_file_and_number(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,question,answer\na.png,F,A\n../b.png,F,A\nc.png,,A\nhttp://x/d.png,F,A\n")
    found = preflight(open_records(tmp_path / "a.csv"), ImageRoots([_images(tmp_path)]))
    assert [(one.kind, one.where.rpartition("a.csv")[2]) for one in found] == [
        ("image_outside", ":1: ../b.png"), ("record", ":2"), ("record", ":3: image"),
    ]  # fmt: skip
    assert "'question' is empty" in found[1].what
    assert "is a URL" in found[2].what


def test_a_table_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(PLAIN)
    (first,) = open_records(path).parts[0].files()  # type: ignore[attr-defined]
    before = first.stat().st_mtime_ns
    assert open_records(path).parts[0].files() == [first]  # type: ignore[attr-defined]
    assert first.stat().st_mtime_ns == before
    path.write_text(PLAIN + "a.png,More?,Yes\n")
    assert len(open_records(path)) == 2


RENAMED = (("image", "bild"), ("question", "frage"), ("answer", "antwort"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_columns_of_other_names_are_read_by_a_setting(name: str, tmp_path: Path) -> None:
    row = {"bild": "a.png", "frage": "Summe?", "antwort": "23,80", "label": "receipt"}
    cells = 'bild,frage,antwort,label\na.png,Summe?,"23,80",receipt\n'
    (tmp_path / name).write_text(cells if name == "a.csv" else json.dumps([row] if name == "a.json" else row))
    (conversation,) = read(open_records(tmp_path / name, selection=TableSelection(columns=RENAMED)))
    assert conversation.images == ("a.png",)
    assert pairs(conversation) == [("Summe?", "23,80")]
    with pytest.raises(DataError, match=r"a\.\w+:0: has no column 'frag' \(got bild, frage.*write 'frage'"):
        read(open_records(tmp_path / name, selection=TableSelection(columns=(("question", "frag"),))))
    _images(tmp_path)
    options = [option for pair in RENAMED for option in ("--columns", "=".join(pair))]
    assert main(["data", "check", str(tmp_path / name), "--images", str(tmp_path / "images"), *options]) == 0
    assert main(["data", "check", str(tmp_path / name), "--columns", "titel=x"]) == 2


def test_an_unknown_column_setting_is_named() -> None:
    from llavar_peft.data.renamed_columns import read_columns

    for given, what in (({"titel": "x"}, "'titel' is unknown, expected id, image"), ({"image": ""}, "has no column")):
        with pytest.raises(ConfigError, match=what):
            read_columns(given, "--columns")


TEXT, IMAGE = datasets.Value("string"), datasets.Image()
EMBEDDED = {"bytes": png(), "path": "scan.png"}
CORD = {"gt_parse": {"menu": [{"nm": "TEA", "price": "2"}, {"nm": "PIE"}], "total": {"total_price": "5"}}, "meta": {}}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]] = {
    "CORD": (
        {"image": IMAGE, "ground_truth": TEXT},
        {"image": EMBEDDED, "ground_truth": json.dumps(CORD)},
        [("Return the fields of this image as JSON.", json.dumps(CORD["gt_parse"], separators=(",", ":")))],
    ),
    "DocVQA": (
        {"questionId": TEXT, "question": TEXT, "question_types": datasets.List(TEXT), "image": IMAGE,
         "docId": datasets.Value("int64"), "answers": datasets.List(TEXT), "data_split": TEXT},
        {"questionId": "7", "question": "Who?", "question_types": ["form"], "image": EMBEDDED, "docId": 1,
         "answers": ["T.F. Riehl", "t.f. riehl"], "data_split": "val"},
        [("Who?", "T.F. Riehl")],
    ),
    "TextVQA": (
        {"image": IMAGE, "image_id": TEXT, "question": TEXT, "answers": datasets.List(TEXT),
         "flickr_original_url": TEXT},
        {"image": EMBEDDED, "image_id": "x", "question": "Brand?", "answers": ["nokia", "nokia x", "nokia x"],
         "flickr_original_url": "https://example.org/a.jpg"},
        [("Brand?", "nokia x")],
    ),
    "the_cauldron": (
        {"images": datasets.List(IMAGE), "texts": datasets.List({"user": TEXT, "assistant": TEXT, "source": TEXT})},
        {"images": [EMBEDDED], "texts": [{"user": "Total?", "assistant": "5", "source": "a"},
                                         {"user": "Date?", "assistant": "May", "source": "a"}]},
        [("Total?", "5"), ("Date?", "May")],
    ),
    "LLaVA-OneVision": (
        {"id": TEXT, "image": IMAGE, "conversations": datasets.List({"from": TEXT, "value": TEXT}),
         "data_source": TEXT},
        {"id": "a/b.png", "image": EMBEDDED, "data_source": "x",
         "conversations": [{"from": "human", "value": "<image>\nTotal?"}, {"from": "gpt", "value": "5"}]},
        [("Total?", "5")],
    ),
    "ChartQA": (
        {"image": IMAGE, "query": TEXT, "label": datasets.List(TEXT), "human_or_machine": datasets.ClassLabel(2)},
        {"image": EMBEDDED, "query": "How many?", "label": ["14"], "human_or_machine": 0},
        [("How many?", "14")],
    ),
    "OCR-VQA": (
        {"image": IMAGE, "questions": datasets.List(TEXT), "answers": datasets.List(TEXT)},
        {"image": EMBEDDED, "questions": ["Title?", "Author?"], "answers": ["Emma", "Austen"]},
        [("Title?", "Emma"), ("Author?", "Austen")],
    ),
    "Donut": (
        {"image": IMAGE, "ground_truth": TEXT},
        {"image": EMBEDDED, "ground_truth": json.dumps({"gt_parses": [
            {"question": "Who?", "answer": "Ann"}, {"question": "Who?", "answer": "ann"},
            {"question": "When?", "answer": "May"}]})},
        [("Who?", "Ann"), ("When?", "May")],
    ),
    "VQAv2": (
        {"image": IMAGE, "question": TEXT, "answers": datasets.List({"answer": TEXT, "answer_confidence": TEXT})},
        {"image": EMBEDDED, "question": "Color?", "answers": [{"answer": one, "answer_confidence": "yes"}
                                                                for one in ("blue", "red", "red")]},
        [("Color?", "red")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_columns_of_published_data_are_read(name: str, tmp_path: Path) -> None:
    types, row, expected = PUBLISHED[name]
    datasets.Dataset.from_list([row], features=datasets.Features(types)).to_parquet(tmp_path / "d.parquet")
    store = open_records(tmp_path / "d.parquet", tmp_path / "cache")
    assert check_records(store, ImageRoots()).clean
    assert preflight(store, ImageRoots()) == []
    (conversation,) = read(store)
    assert pairs(conversation) == expected
    (image,) = conversation.images
    assert isinstance(image, EmbeddedImage)
    assert bytes(image.data) == png()
    assert (image.path, str(image).endswith(" (scan.png)")) == ("scan.png", True)
    assert image_count(store[0]) == 1
    assert text_tokens(store[0]) >= sum(len(one) for pair in expected for one in pair) // 4


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "languages": ({"query": {"en": "Who?", "de": "Wer?"}, "answers": ["Ann"]}, "'query' is no text (got an object)",
                  "--columns question=query.en"),
    "choices": ({"question": "Which?", "options": ["a", "b"], "answer": "1"}, "has choices under 'options'",
                "write the choices into the question"),
    "span": ({"question": "Who?", "answer": {"start": 1}}, "'answer' holds no text", "write the answer as a text"),
    "lists": ({"questions": ["a", "b"], "answers": ["a"]}, "got 2 questions and 1 answers", "one answer for each"),
    "broken JSON": ({"ground_truth": '{"gt_parse": '}, "'ground_truth' is not JSON", "correct the JSON"),
    "texts": ({"texts": [{"user": 1}]}, "texts[0] is no pair of texts", '"user"'),
    "class": ({"label": 3}, "has no 'question'", "question"),
    "truth": ({"question": "Is it?", "answer": True}, "'answer' holds no text", "as a text"),
    "typo": ({"conversation": []}, "has no 'conversations'", "rename 'conversation' to 'conversations'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_cannot_be_read_say_why(name: str) -> None:
    row, what, fix = REFUSED[name]
    with pytest.raises(DataError) as raised:
        parse_record({"image": "a.png", **row}, "d:3")
    assert what in str(raised.value)
    assert fix in str(raised.value)
    assert str(raised.value).startswith("d:3: ")


def test_a_key_in_a_column_is_read_by_a_setting() -> None:
    rows = [{"image": "a.png", "query": {"en": "Who?", "de": "Wer?"}, "answers": ["Ann"], "answer": {"start": 1}}]
    given = TableSelection(columns=(("question", "query.en"), ("answer", "answers")))
    assert pairs(read(open_records(rows, selection=given))[0]) == [("Who?", "Ann")]


def test_images_stand_on_both_sides_of_the_questions_and_where_a_question_says() -> None:
    rows = [{"image": "a.png", "question": "Total?", "answer": str(number)} for number in range(400)]
    turns = [one.turns[0].text for one in read(open_records(rows))]
    assert set(turns) == {"<image>\nTotal?", "Total?\n<image>"}
    assert 150 < turns.count("<image>\nTotal?") < 250
    placed = {"images": ["a.png", "b.png"], "question": "Is <image> as <image>?", "answer": "no"}
    assert parse_record(placed, "x:0").turns[0].text == "Is <image> as <image>?"
    beside = parse_record({**placed, "question": "Equal?"}, "x:0").turns[0].text
    assert beside in ("<image>\n<image>\nEqual?", "Equal?\n<image>\n<image>")
