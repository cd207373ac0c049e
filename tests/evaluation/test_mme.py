"""MME's OCR questions: the published answers, both rules, both layouts of the folder, a model asked."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llavar_peft import cli
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.mme_ocr import read_answers, read_folder, read_yes_or_no, score_images
from llavar_peft.evaluation.vqa.scored_results import Setting


@pytest.mark.parity
@pytest.mark.parametrize(("name", "accuracy", "plus", "score"), [("llava", 50, 0, 50), ("llavar", 60, 20, 80)])
def test_published_answers(
    shared_dir: Path, name: str, accuracy: float, plus: float, score: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Source: arXiv 2306.17107, the table of MME; the answers are LLaVAR's."""
    file = shared_dir / "reference" / "mme" / f"OCR_{name}.txt"
    if not file.is_file():
        pytest.skip(f"the published answers are not at {file}")
    assert cli.main(["eval", "mme", "--answers", str(file), "--json"]) == 0
    figures = {one["protocol"]: one["value"] for one in json.loads(capsys.readouterr().out)["figures"]}
    expected = {"mme accuracy": accuracy, "mme accuracy+": plus, "mme score": score, "mme neither": 0}
    assert {protocol: figures[protocol] for protocol in expected} == expected


@pytest.mark.parametrize(
    ("answer", "prefix", "word"),
    [
        ("Yes, it is.", "yes", "yes"),
        ("no", "no", "no"),
        ("NO.", "no", "no"),
        (" Yes", "yes", "yes"),
        ("The answer is yes.", None, "yes"),
        ("Nothing is yes", "no", "yes"),  # "no" is among the first four letters
        ("Not sure", "no", None),
        ("", None, None),
        ("Eyes", "yes", None),
        ("maybe", None, None),
    ],
)
def test_rules(answer: str, prefix: str | None, word: str | None) -> None:
    assert read_yes_or_no(answer, "mme") == prefix
    assert read_yes_or_no(answer, "mme-first-word") == word


def test_both_questions_count_for_accuracy_plus(tmp_path: Path) -> None:
    lines = ["a.jpg\tQ1\tYes\tYes.", "b.jpg\tQ1\tYes\tno", "a.jpg\tQ2\tNo\tno, it is\tnot", "b.jpg\tQ2\tNo\tI think no"]
    (tmp_path / "OCR.txt").write_text("\n".join(lines) + "\n")
    results = score_images(read_answers(tmp_path / "OCR.txt"), "OCR.txt", Setting())
    values = {figure.protocol: figure.value for figure in results.figures}
    assert values["mme accuracy"] == 50  # "I th" is neither
    assert values["mme accuracy+"] == 50
    assert values["mme neither"] == 25
    assert values["mme-first-word score"] == 75 + 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg\tQ\tYes", "has 3 columns"),
        ("a.jpg\tQ\tperhaps\tYes", "the truth is neither yes nor no"),
        ("a.jpg\tQ\tYes\tYes", "has 1 questions on a.jpg, expected 2"),
        ("", "holds no questions"),
    ],
)
def test_faulty_answers(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "OCR.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_answers(tmp_path / "OCR.txt")


def benchmark(root: Path, *, apart: bool) -> Path:
    texts, images = (root / "OCR/questions_answers_YN", root / "OCR/images") if apart else (root / "OCR", root / "OCR")
    for folder in (texts, images):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("0001", "0002"):
        (texts / f"{name}.txt").write_text("Is it A?\tYes\nIs it B?\tNo\n")
        Image.new("RGB", (40, 30)).save(images / f"{name}.jpg")
    return root


@pytest.mark.parametrize("apart", [False, True])
def test_folder(tmp_path: Path, apart: bool) -> None:
    questions, images = read_folder(benchmark(tmp_path, apart=apart))
    assert [(one.image, one.question, one.truths) for one in questions[:2]] == [
        ("0001.jpg", "Is it A?", ("yes",)),
        ("0001.jpg", "Is it B?", ("no",)),
    ]
    assert (images / "0001.jpg").is_file()
    (images / "0002.jpg").unlink()
    with pytest.raises(DataError, match=r"0002\.txt: has no image"):
        read_folder(tmp_path)


@pytest.mark.slow
def test_a_model_is_asked(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    command = ["eval", "mme", "--folder", str(benchmark(tmp_path, apart=False)), "--model", str(checkpoint)]
    assert cli.main([*command, "--max-new-tokens", "4", "--out", str(out), "--json"]) == 0
    figure = json.loads(capsys.readouterr().out)["figures"][0]
    assert (figure["records"], figure["temperature"]) == (4, 0.2)
    assert cli.main(["eval", "compare", str(out), str(out)]) == 0
    assert cli.main(["eval", "mme", "--folder", str(tmp_path)]) == 2


def test_answers_may_contain_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "answers.txt"
    path.write_text("a.jpg\tQ1\tYes\tYes \u2028 it \x85 is\na.jpg\tQ2\tNo\tno\n", encoding="utf-8")
    assert [question.answer for question in read_answers(path)] == ["Yes \u2028 it \x85 is", "no"]


def test_settings_may_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.txt"
    path.write_text("a.jpg\tQ1\tYes\tYes\na.jpg\tQ2\tNo\tno\n", encoding="utf-8")
    assert cli.main(["eval", "mme", "--answers", str(path), "--temperature", "0.2", "--json"]) == 0
    figure = json.loads(capsys.readouterr().out)["figures"][0]
    assert (figure["temperature"], figure["seed"]) == (0.2, None)
    assert cli.main(["eval", "mme", "--answers", str(path), "--quantize", "nf4"]) == 2
    assert "--quantize: it has no effect on the answers in" in capsys.readouterr().err
