"""Questions that are no questions: empty, or not text that can be encoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavar_peft.cli import main
from llavar_peft.errors import DataError
from llavar_peft.inference.question_file import read_question_file
from llavar_peft.text_files import check_question


@pytest.mark.parametrize("question", ["", " ", "\t\n", "\u3000"])
def test_an_empty_question_is_refused_before_a_model_is_loaded(
    question: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", question, "--model", "no-such-model"]) == 2
    assert "question: is empty" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["half \ud83d", "caf\udce9", "NUL \0"])
def test_a_question_that_is_not_text_is_refused(question: str) -> None:
    with pytest.raises(DataError, match=r"half of a character|NUL"):
        check_question(question)


def test_an_empty_question_of_a_file_is_named_and_an_empty_line_skipped(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('\n{"question_id": 1, "text": "Who?"}\n  \n')
    assert [question.text for question in read_question_file(path)] == ["Who?"]
    for text in ('""', '"  "', '"\\n"'):
        path.write_text(f'{{"question_id": 1, "text": "Who?"}}\n{{"question_id": 2, "text": {text}}}\n')
        with pytest.raises(DataError, match=r"q\.jsonl:2: text is empty"):
            read_question_file(path)
