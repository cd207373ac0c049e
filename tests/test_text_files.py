"""Text files of users: every reader knows the same encodings and line ends, and rejects the rest in the same words."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import open_records, parse_record
from llavar_peft.datagen.ocr.make_conversations import read_captions
from llavar_peft.errors import LlavarError
from llavar_peft.evaluation.judge.judge_cases import read_unanswered
from llavar_peft.evaluation.vqa.mme_ocr import read_answers
from llavar_peft.evaluation.vqa.vqa_questions import read_vqa_questions
from llavar_peft.inference.question_file import read_question_file
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.recipe.recipe_yaml import parse_yaml
from llavar_peft.text_encodings import detect_unicode
from llavar_peft.text_files import read_text

TEXTS = ["Où est le café ?", "Größe, 5 €", "été"]


def record(text: str, number: int = 0) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Ja"}]
    return {"id": str(number), "conversations": turns}


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_records(path: Path) -> list[str]:
    store = pickle.loads(pickle.dumps(open_records(path)))  # as a worker process opens it
    return [parse_record(store[index], store.where(index)).turns[0].text for index in range(len(store))]


# A reader of each kind of file: the file's name, its content, and how the texts are read from it.
READERS: dict[str, tuple[Callable[[list[str]], str], Callable[[Path], list[str]]]] = {
    "records.json": (lambda texts: json.dumps([record(*one[::-1]) for one in enumerate(texts)], ensure_ascii=False,
                                              indent=1), read_records),
    "records.jsonl": (lambda texts: lines([record(text) for text in texts]), read_records),
    "questions.jsonl": (
        lambda texts: lines([{"question_id": 1, "text": text} for text in texts]),
        lambda path: [question.text for question in read_question_file(path)],
    ),
    "dataset.json": (
        lambda texts: json.dumps({"data": [{"question": text, "answers": ["a"]} for text in texts]},
                                 ensure_ascii=False, indent=1),
        lambda path: [question.question for question in read_vqa_questions(path)],
    ),
    "dataset.jsonl": (
        lambda texts: lines([{"question": text, "answers": ["a"]} for text in texts]),
        lambda path: [question.question for question in read_vqa_questions(path)],
    ),
    "judge.jsonl": (
        lambda texts: lines([{"question_id": 1, "image": "a.png", "text": text} for text in texts]),
        lambda path: [question.question for question in read_unanswered(path, ImageRoots())],
    ),
    "captions.json": (
        lambda texts: json.dumps(dict(zip("abc", texts, strict=True)), ensure_ascii=False, indent=1),
        lambda path: list(read_captions(path).values()),
    ),
    "mme.txt": (
        lambda texts: "".join(f"{text}.png\t{text}\tYes\tyes\n" * 2 for text in texts),
        lambda path: [question.question for question in read_answers(path)][::2],
    ),
    "recipe.yaml": (
        lambda texts: (
            "model: {checkpoint: x}\noutput_dir: x\nstages:\n"
            + "".join(
                f"  - {{name: s{number}, data: {{records: {json.dumps(text, ensure_ascii=False)}}}, tune: lora, "
                "optim: {learning_rate: 1.0}, global_batch_size: 1, micro_batch_size: 1}\n"
                for number, text in enumerate(texts)
            )
        ),
        lambda path: [str(stage.data.records) for stage in load_recipe(path).stages],
    ),
}  # fmt: skip
each_reader = pytest.mark.parametrize("name", READERS)


def message(name: str, path: Path) -> str:
    with pytest.raises(LlavarError) as caught:
        READERS[name][1](path)
    assert len(str(caught.value)) < 600
    return str(caught.value)


@each_reader
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_unicode_is_recognized(name: str, encoding: str, tmp_path: Path) -> None:
    write, read = READERS[name]
    path = tmp_path / name
    path.write_bytes(write(TEXTS).encode(encoding))
    assert read(path) == TEXTS


@each_reader
@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_other_systems_are_recognized(name: str, end: str, tmp_path: Path) -> None:
    write, read = READERS[name]
    path = tmp_path / name
    path.write_bytes(write(TEXTS).replace("\n", end).encode())
    assert read(path) == TEXTS


@each_reader
def test_another_encoding_is_named_with_a_command_that_converts_it(name: str, tmp_path: Path) -> None:
    write, read = READERS[name]
    path = tmp_path / name
    data = write(TEXTS).encode("cp1252")
    path.write_bytes(data)
    said = message(name, path)
    assert f"byte 0xf9 at position {data.index(0xF9)}" in said
    assert "is not UTF-8; it may be CP1252" in said
    assert "Où est" in said
    command = said[said.index("iconv") : said.rindex(".")]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read(tmp_path / shlex.split(command)[-1]) == TEXTS


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("GB18030", "请问这张海报上的电影是谁主演的？什么时候上映？"),
        ("CP932", "この看板には何と書いてありますか。能力表示ソフト"),
        ("CP949", "표지판에 무엇이 적혀 있습니까? 오늘의 날씨는?"),
        ("BIG5", "請問這張海報上的電影是誰主演的？什麼時候上映？"),
        ("CP1251", "Что написано на вывеске? Сколько это стоит?"),
    ],
)
@pytest.mark.parametrize("name", ["records.json", "questions.jsonl"])
def test_encodings_of_asia_and_russia_are_named(encoding: str, text: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(READERS[name][0]([text, text, text]).encode(encoding))
    said = message(name, path)
    assert f"iconv -f {encoding} -t UTF-8" in said
    assert said.count("Fix: ") == 1  # one message for the file, not one for each line


def test_a_damaged_byte_in_utf8_is_no_other_encoding(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(READERS["records.jsonl"][0](TEXTS).encode().replace("Größe".encode(), b"Gr\xf6\xc3\x9fe"))
    store = open_records(path)
    assert store[0]["conversations"][0]["value"] == TEXTS[0]  # only the damaged record is at fault
    with pytest.raises(LlavarError, match=r"jsonl:1: byte 0xf6 at position \d+ is not UTF-8, although other text"):
        store[1]


@each_reader
def test_half_of_a_character_and_nul_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    text = READERS[name][0](TEXTS)
    path.write_text(text.replace("café", "caf\\ud83d"), encoding="utf-8")
    if path.suffix in (".json", ".jsonl"):
        assert "half of a character" in message(name, path)
    path.write_text(text.replace("café", "caf\0"), encoding="utf-8")
    assert any(word in message(name, path) for word in ("NUL", "invalid character", "invalid control character"))


@each_reader
def test_what_is_no_text_file_is_named_and_never_waited_for(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert "no such file" in message(name, path)
    os.mkfifo(path)
    assert "is a pipe or a device" in message(name, path)
    path.unlink()
    path.mkdir()
    assert "folder" in message(name, path)
    path.rmdir()
    for content, what in ((b"PAR1\0\0", "Parquet"), (b"\x1f\x8b\x08", "compressed"), (b"PK\3\4", "ZIP archive")):
        path.write_bytes(content)
        assert what in message(name, path)
    for content in (b"", b"\xef\xbb\xbf", b"\xff\xfe", b" \n")[: 0 if name == "records.jsonl" else 4]:
        path.write_bytes(content)
        assert "Fix: " in message(name, path) or name == "recipe.yaml"


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith((".json", ".jsonl"))])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "integer"),
        ("{'a': 1}", "at byte"),
        ('"cut', "line|column|cut off|truncated|nterminated"),
    ],
    ids=["deep", "huge", "syntax", "cut"],
)
def test_syntax_errors_name_the_place(name: str, value: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = f'{{"a": {value}}}'
    path.write_text(content if name.endswith("jsonl") else f"[{content}]")
    said = message(name, path)
    assert any(part.lower() in said.lower() for part in what.split("|")), said
    assert said.startswith(str(path))


def test_text_without_a_mark_is_utf16_only_where_it_is_plain() -> None:
    assert detect_unicode('{"text": "一"}'.encode("utf-16-le")).encoding == "utf-16-le"
    assert detect_unicode("\u0416\u0418".encode("utf-16-be")).encoding == "utf-8"  # not plain
    assert detect_unicode(b"a\0").encoding == "utf-16-le"
    for data in (b"", b"a", b"plain text with one \0 in it", "日本語".encode(), bytes(range(256))):
        assert detect_unicode(data).encoding == "utf-8"


def test_text_has_one_kind_of_line_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "a.txt") == "a\nb\nc\n"


def test_a_key_that_is_there_twice_is_refused_where_the_keys_are_names(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('{"a.png": "one", "a.png": "two"}')
    with pytest.raises(LlavarError, match=r"contains the key 'a\.png' twice"):
        read_captions(tmp_path / "captions.json")


LIST_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


MERGE_BOMB = LIST_BOMB.replace("[x,x,x,x,x,x,x,x,x]", "{x: 1}").replace("[*", "{<<: [*").replace("]\n", "]}\n")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (LIST_BOMB, ":6:4: its aliases stand for too many values"),
        (MERGE_BOMB, "too many values"),
        ("a: &a [*a]", "too many values"),
        ("? [1, 2]\n: 3", ":1:3: a key is not text"),
        ("? {a: 1}\n: 3", "a key is not text"),
        ("a: b\nc: !!int x", ":2:4: a value is no valid int"),
        ("a: !!timestamp x", "no valid timestamp"),
        ("a: !!bool x", "no valid bool"),
        ("a: !!float ''", "no valid float"),
        ("a: " + "9" * 5000, "no valid int"),
        ("a: b\nc: \x07", r":2:4: invalid character '\\x07'"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("[\n" * 50_000, "nested too deeply"),
        ("a: 1\na: 2", "duplicate key 'a'"),
    ],
    ids=lambda value: value[:12],
)
def test_hostile_yaml_ends_at_once_in_a_message(text: str, what: str) -> None:
    with pytest.raises(LlavarError, match=what) as caught:
        parse_yaml(text, "r.yaml")
    assert "\n" not in str(caught.value)


def test_ordinary_aliases_are_kept() -> None:
    assert parse_yaml("a: &x {p: 1}\nb: *x\nc: {<<: *x, q: 2}", "r.yaml")["c"] == {"p": 1, "q": 2}


def test_a_file_of_records_given_as_recipe_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text("[" + " " * 2**21 + "]")
    with pytest.raises(LlavarError, match="too large for a recipe"):
        load_recipe(tmp_path / "records.json")
