"""A file of questions to a file of answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llavar_peft import cli, load_chat
from llavar_peft.errors import ConfigError, DataError, ImageError
from llavar_peft.inference.answer_file import GenerateReport, generate_answers
from llavar_peft.inference.question_file import read_question_file
from llavar_peft.inference.token_sampling import Sampling
from tests.commands import ranks, run_command

GREEDY = Sampling(temperature=0.0, max_new_tokens=8)


@pytest.fixture
def work(tmp_path: Path, images: list[Path]) -> Path:
    """Seven questions of various lengths, one of them without an image; ids of any kind, not all different."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for number, words in enumerate(
        ("Read.", "What does it say? " * 5, "Total?", "Who\u2028wrote it?", "Title?", "No", "Date?")
    ):
        name = f"page {number}.png"
        shutil.copy(images[number % len(images)], folder / (f"COCO_val2014_{name}" if number == 4 else name))
        fields = {"question_id": "a" if number < 2 else number, "image": name, "text": words, "category": "read"}
        lines.append({name: value for name, value in fields.items() if not (number == 5 and name == "image")})
    (tmp_path / "questions.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    )
    return tmp_path


def run(checkpoint: Path, work: Path, out: str = "answers.jsonl", **settings: Any) -> GenerateReport:
    settings = {"sampling": GREEDY, **settings}
    return generate_answers(checkpoint, work / "questions.jsonl", work / "images", work / out, **settings)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.mark.slow
def test_answers_are_those_of_asking_one_by_one(checkpoint: Path, work: Path) -> None:
    chat = load_chat(checkpoint)
    questions = [json.loads(line) for line in (work / "questions.jsonl").read_text().split("\n") if line]
    for size in (1, 3, 8):
        report = run(checkpoint, work, f"{size}.jsonl", batch_size=size)
        assert (report.count, report.kept, report.skipped) == (7, 0, ())
    answers = read(work / "1.jsonl")
    assert (work / "1.jsonl").read_bytes() == (work / "3.jsonl").read_bytes() == (work / "8.jsonl").read_bytes()
    for question, answer in zip(questions, answers, strict=True):
        name = question.get("image")
        file = name and (work / "images" / ("COCO_val2014_page 4.png" if "4" in name else name))
        assert answer["text"] == chat.ask(file, question["text"], temperature=0.0, max_new_tokens=8)
        assert list(answer) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert (answer["question_id"], answer["prompt"]) == (question["question_id"], question["text"])
    assert len({answer["answer_id"] for answer in answers}) == 7
    assert sorted(path.name for path in work.iterdir()) == [
        "1.jsonl",
        "3.jsonl",
        "8.jsonl",
        "images",
        "questions.jsonl",
    ]


@pytest.mark.slow
def test_the_image_mode_is_the_models(checkpoint: Path, work: Path) -> None:
    processor = load_chat(checkpoint).engine.processor
    for mode in (None, processor.inference_image_mode, "pad_black"):
        run(checkpoint, work, f"{mode}.jsonl", image_mode=mode)
    own, same, other = (
        [answer["text"] for answer in read(work / f"{mode}.jsonl")]
        for mode in (None, processor.inference_image_mode, "pad_black")
    )
    assert own == same != other


def _stop_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


def test_a_stopped_run_resumes(checkpoint: Path, work: Path) -> None:
    hot = Sampling(temperature=1.0, seed=5, max_new_tokens=8)
    run(checkpoint, work, "whole.jsonl", sampling=hot)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, work, sampling=hot, batch_size=2, progress=_stop_after(3))
    assert not (work / "answers.jsonl").exists()
    (part,) = (work / ".answers.jsonl.parts").glob("part-*")
    finished = part.read_bytes()
    assert len(finished.splitlines()) >= 3
    with part.open("ab") as file:
        file.write(b'{"place": 6, "te')  # killed while writing
    with pytest.raises(ConfigError, match=r"other settings .image_mode was None and is 'pad_black', sampling"):
        run(checkpoint, work, image_mode="pad_black")
    counts: list[tuple[int, int]] = []
    report = run(checkpoint, work, sampling=hot, batch_size=3, progress=lambda *both: counts.append(both))
    kept = len(finished.splitlines())
    assert counts[-1] == (7 - kept, 7 - kept)
    assert (report.count, report.kept) == (7, kept)
    assert (work / "answers.jsonl").read_bytes() == (work / "whole.jsonl").read_bytes()
    assert not (work / ".answers.jsonl.parts").exists()


def test_a_stopped_run_resumes_only_with_the_same_weights(checkpoint: Path, work: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    with pytest.raises(KeyboardInterrupt):
        run(model, work, batch_size=2, progress=_stop_after(3))
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("multi_modal_projector.bias"))
    save_file({**tensors, name: tensors[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other settings \(weights was [^,]*\)"):
        run(model, work)


@pytest.mark.parametrize("there", ["", "three", "three and a half", "other ends"])
def test_earlier_answers_are_kept_and_missing_ones_added(there: str, checkpoint: Path, work: Path) -> None:
    run(checkpoint, work, "whole.jsonl")
    whole = (work / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    found = {"": [], "three": lines[:3], "three and a half": [*lines[:3], lines[3][:40]], "other ends": lines[::6]}
    (work / "answers.jsonl").write_bytes(b"".join(found[there]))
    # What a run leaves that was killed while it removed its folder.
    (work / ".answers.jsonl.parts").mkdir()
    (work / ".answers.jsonl.parts/part-00001.jsonl").write_text('{"place": 6, "text": "of another run"}\n')
    report = run(checkpoint, work)
    assert (report.count, report.kept) == (7, sum(line.endswith(b"\n") for line in found[there]))
    assert (work / "answers.jsonl").read_bytes() == whole


@pytest.mark.parametrize(("field", "value"), [("model_id", "other"), ("prompt", "Else?"), ("question_id", "b")])
def test_answers_of_another_run_are_rejected(field: str, value: str, checkpoint: Path, work: Path) -> None:
    run(checkpoint, work)
    answers = read(work / "answers.jsonl")
    answers[1][field] = value
    (work / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    before = (work / "answers.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"answers.jsonl:2: is (not )?an answer"):
        run(checkpoint, work)
    assert (work / "answers.jsonl").read_bytes() == before


@pytest.mark.slow
def test_two_processes_give_the_file_of_one(checkpoint: Path, work: Path) -> None:
    options = ["--questions", "questions.jsonl", "--images", "images", "--answers", "two.jsonl", "--greedy"]
    done = ranks(run_command, ["generate", "--model", str(checkpoint), *options, "--max-new-tokens", "8"], work)
    assert [one.status for one in done] == [0, 0], [one.stderr[-2000:] for one in done]
    assert done[0].stdout.startswith("two.jsonl: 7 answers in")
    run(checkpoint, work, "one.jsonl")
    assert (work / "two.jsonl").read_bytes() == (work / "one.jsonl").read_bytes()


def test_bad_images_are_named(checkpoint: Path, work: Path, caplog: pytest.LogCaptureFixture) -> None:
    (work / "images/page 2.png").unlink()
    with pytest.raises(ImageError, match=r"questions.jsonl:3: page 2.png: is in none of"):
        run(checkpoint, work)
    (work / "images/page 2.png").write_text("<html>")
    with pytest.raises(ImageError, match=r"questions.jsonl:3: .*page 2.png: is a web page"):
        run(checkpoint, work)
    shutil.rmtree(work / ".answers.jsonl.parts")
    report = run(checkpoint, work, on_bad_image="skip")
    assert (report.count, len(report.skipped)) == (6, 1)
    assert "page 2.png: is a web page" in report.skipped[0]
    assert "skipped: " in caplog.text
    assert [answer["question_id"] for answer in read(work / "answers.jsonl")] == ["a", "a", 3, 4, 5, 6]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a\0b", "linked.png"])
def test_images_stay_in_their_folder(path: str, checkpoint: Path, work: Path) -> None:
    (work / "secret.png").write_bytes((work / "images/page 0.png").read_bytes())
    (work / "images/linked.png").symlink_to(work / "secret.png")
    (work / "questions.jsonl").write_text(json.dumps({"question_id": 1, "image": path, "text": "Read."}))
    with pytest.raises(ImageError, match=r"outside the image folders|not a path"):
        run(checkpoint, work)


def test_invalid_questions_are_rejected(checkpoint: Path, work: Path) -> None:
    half = '{"question_id": 5, "text": "\\ud83d"}'
    (work / "questions.jsonl").write_text(f'{{"question_id": 1}}\n[]\n{{"text": "Who?"}}\nnothing\n{half}\n')
    with pytest.raises(DataError) as caught:
        run(checkpoint, work)
    assert [fault.where.rpartition(":")[2] for fault in caught.value.faults] == ["1", "2", "3", "4", "5"]
    assert "half of a character" in str(caught.value)
    (work / "questions.jsonl").write_text(json.dumps({"question_id": 1, "text": "word " * 3000}))
    with pytest.raises(DataError, match=r"questions.jsonl:1: .* tokens, the model's context 2048"):
        run(checkpoint, work)


def test_the_command(checkpoint: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--questions", work / "questions.jsonl", "--images", work / "images", "--answers", work / "answers.jsonl"]
    arguments = ["generate", "--model", checkpoint, *files, "--greedy", "--max-new-tokens", 8, "--batch-size", 4]
    assert cli.main(list(map(str, arguments))) == 0
    captured = capsys.readouterr()
    assert "answers.jsonl: 7 answers in" in captured.out
    assert "answering: 7 of 7" in captured.err
    run(checkpoint, work, "expected.jsonl")
    assert (work / "answers.jsonl").read_bytes() == (work / "expected.jsonl").read_bytes()
    assert cli.main(list(map(str, arguments))) == 0
    assert "all questions are answered already; delete the file to answer them again" in capsys.readouterr().out
    (work / "questions.jsonl").write_text(json.dumps({"question_id": "new", "text": "Who?"}))
    assert cli.main(list(map(str, arguments))) == 2
    assert "is not an answer to these questions" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['[{"id": "1", "image": "a.png"}]', '{"a": 1}', "notes", '["no end'])
def test_a_file_of_another_kind_is_not_overwritten(checkpoint: Path, work: Path, content: str) -> None:
    (work / "answers.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="is not an answer to these questions"):
        run(checkpoint, work)
    assert (work / "answers.jsonl").read_text() == content


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_questions_is_one_message(indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([{"question_id": n, "text": "Read."} for n in range(20)], indent=indent))
    with pytest.raises(DataError, match="one question per line") as caught:
        read_question_file(path)
    assert len(str(caught.value).splitlines()) == 1
