"""Journals of finished work: what is kept after a crash, and that journals written by version 0.1 are resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavar_peft.data.resume_journal import ReplyFolder, ResumeJournal, read_entries
from llavar_peft.errors import ConfigError, DataError, EnvironmentFaultError
from llavar_peft.inference.question_file import AnswerJournal
from llavar_peft.text_files import read_json_lines

OCR_JOURNAL = (
    '{"format":2,"engines":{"rapidocr":"3.4.2"},"short_edge":384}\n'
    '{"path":"a.png","size":9,"mtime_ns":1,"width":30,"height":20,"hash":"00","blank":false,'
    '"lines":{"rapidocr":[["GRÜN",[0.0,0.0,9.0,0.0,9.0,5.0,0.0,5.0],0.91]]}}\n'
)
REPLIES_JOURNAL = '{"format":1}\n{"key":"0a","model":"m","reply":"{\\"turns\\": []}"}\n'
ANSWER_LOG = (
    '{"setting": {"prompt": "{question}", "image_mode": null, "temperature": 0.0, "max_new_tokens": 8},'
    ' "questions": "0123456789abcdef"}\n'
    '{"id": "1", "question": "Who?", "answer": "Änne", "gt_answers": ["A"], "image_path": "a.png"}\n'
    '{"id": "2", "question": "Why?", "answer": "B", "gt_answers": [], "image_path": null}\n'
)
ANSWER_PART = '{"place": 2, "text": "\\u00c4nne"}\n{"place": 0, "skipped": "a.png: is missing"}\n'
ANSWER_SETTINGS = '{\n  "questions": "ab",\n  "sampling": {\n    "temperature": 0.7,\n    "stop": []\n  }\n}\n'


def entries(path: Path, heading: dict[str, Any] | None) -> list[dict[str, Any]]:
    with ResumeJournal(path, heading) as journal:
        return [entry for _, entry in journal.entries()]


@pytest.mark.parametrize("text", [OCR_JOURNAL, REPLIES_JOURNAL, ANSWER_LOG])
def test_a_journal_of_version_0_1_is_resumed(text: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text, encoding="utf-8")
    heading, *expected = map(json.loads, text.splitlines())
    assert entries(path, heading) == expected
    assert path.read_text(encoding="utf-8") == text
    with ResumeJournal(path, heading) as journal:
        journal.append({"more": "Ü"})
    assert entries(path, heading) == [*expected, {"more": "Ü"}]
    assert path.read_text(encoding="utf-8").startswith(text)


def test_answers_of_version_0_1_are_resumed(tmp_path: Path) -> None:
    folder = tmp_path / ".answers.jsonl.parts"
    folder.mkdir()
    (folder / "settings.json").write_text(ANSWER_SETTINGS)
    (folder / "part-00000.jsonl").write_text(ANSWER_PART + '{"place": 5, "te')
    (folder / "part-00001.jsonl").write_text('{"place": 1, "text": ""}\n')
    journal = AnswerJournal(tmp_path / "answers.jsonl", 0)
    assert journal.begun
    journal.begin(json.loads(ANSWER_SETTINGS))
    assert {place: entry.get("text") for place, entry in journal.read().items()} == {0: None, 1: "", 2: "Änne"}
    with journal:
        journal.write([{"place": 5, "text": "whole"}])
    assert journal.read()[5] == {"place": 5, "text": "whole"}
    with pytest.raises(ConfigError, match=r"other settings \(sampling\.temperature was 0\.7 and is 0\)"):
        journal.begin({"questions": "ab", "sampling": {"temperature": 0, "stop": []}})


@pytest.mark.parametrize("cut", [1, 5, 40, len(OCR_JOURNAL.encode()) - 70])
def test_an_incomplete_line_is_removed(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(OCR_JOURNAL.encode()[:-cut])
    heading = json.loads(OCR_JOURNAL.splitlines()[0])
    assert list(read_entries(path)) == []
    with ResumeJournal(path, heading) as journal:
        journal.append({"path": "b.png"})
    assert entries(path, heading) == [{"path": "b.png"}]


def test_entries_are_removed_from_an_offset_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with ResumeJournal(path) as journal:
        journal.append(*({"number": number} for number in range(4)))
        offset = list(journal.entries())[2][0]
        journal.truncate(offset)
        journal.append({"number": 9})
    assert [entry["number"] for entry in entries(path, None)] == [0, 1, 9]


def test_other_settings_and_other_files_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(ANSWER_LOG, encoding="utf-8")
    heading = json.loads(ANSWER_LOG.splitlines()[0])
    heading["setting"] |= {"temperature": 0.9, "image_mode": "pad"}
    message = r"setting\.image_mode was None and is 'pad', setting\.temperature was 0\.0 and is 0\.9\)"
    for error in (ConfigError, DataError):  # version 0.1 raised either
        with pytest.raises(error, match=message):
            ResumeJournal(path, heading)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"journal\.jsonl:1: is not a JSON object"):
        ResumeJournal(path, heading)
    path.write_text("{}\n{oops}\n{}\n")
    with pytest.raises(DataError, match=r"journal\.jsonl:2: is not JSON"):
        entries(path, {})


def test_a_second_writer_is_rejected(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with ResumeJournal(tmp_path / "journal.jsonl", {"a": 1}), pytest.raises(EnvironmentFaultError, match="another"):
        ResumeJournal(tmp_path / "journal.jsonl", {"a": 1})


def test_replies_are_kept_by_key_and_a_damaged_one_is_missing(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{\n  "request": {"model": "gpt-4"},\n  "reply": "8 9"\n}\n')
    (tmp_path / "torn.json").write_text('{"reply": "8')
    replies = ReplyFolder(tmp_path)
    assert (replies.read("old")["reply"], replies.read("torn"), replies.read("none")) == ("8 9", None, None)
    replies.write("new", {"reply": "half \ud83d"})
    assert ReplyFolder(tmp_path).read("new") == {"reply": "half \ud83d"}


def test_json_lines_are_located(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\n\n[1]\r\n'.encode())
    assert list(read_json_lines(path)) == [(f"{path}:1", {"a": "x\u2028y"}), (f"{path}:3", [1])]
    for bad in (b"{oops}\n{}\n", b'"\xff"\n{}\n'):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"lines\.jsonl:1: .*Fix: "):
            list(read_json_lines(path, fix="fetch it again", unfinished=True))


def test_an_unfinished_file_of_json_lines_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert list(read_json_lines(path, unfinished=True)) == []
    with pytest.raises(DataError, match="no such file"):
        list(read_json_lines(path))
    path.write_bytes('{"a": 1}\n{"b": "ü'.encode()[:-1])
    assert list(read_json_lines(path, unfinished=True)) == [(f"{path}:1", {"a": 1})]
    with pytest.raises(DataError, match=r"lines\.jsonl:2: byte 0xc3 at position 16 .*ends within a character"):
        list(read_json_lines(path))
