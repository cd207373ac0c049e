"""``llavar-peft eval vqa`` from a model to figures, and after a kill; ``compare`` and ``diagnose`` on its results."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llavar_peft import ModelConfig, Tiles, build_model, cli, load_chat
from llavar_peft.evaluation.vqa.scored_results import read_results
from llavar_peft.weights.adapter.model_hash import identify_model
from tests.inference.reference import greedy_answers


def ask(checkpoint: Path, images: Path, out: Path, *more: str) -> int:
    known = [
        "--dataset",
        str(images / "dataset.json"),
        "--images",
        str(images / "images"),
        "--model",
        str(checkpoint),
    ]
    return cli.main(["eval", "vqa", *known, "--max-new-tokens", "6", "--batch-size", "2", "--out", str(out), *more])


@pytest.fixture(scope="module")
def done(checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "results.json"
    assert ask(checkpoint, images, out, "--image-mode", "pad_black") == 0
    return out


def answers(out: Path) -> list[str]:
    return [record.answer for record in read_results(out).records]


def test_every_figure_has_its_setting(done: Path, checkpoint: Path) -> None:
    content = json.loads(done.read_text())
    assert [figure["protocol"] for figure in content["figures"]] == [
        "multimodalocr", "substring", "anls", "exact", "cer", "wer",
    ]  # fmt: skip
    for figure in content["figures"]:
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["records"] == 5
        assert figure["prompt"] == "{question}"
        assert (figure["image_mode"], figure["temperature"], figure["decoding"]) == ("pad_black", 0.9, "sampled")
        assert figure["top_k"] == 50  # the original's, by its library's default
        assert figure["model_hash"] == identify_model(checkpoint)
    record = content["records"][0]
    assert record["fields"] == {"kind": "signs"}
    assert 0 < record["letter_height"] < 20  # as the tower sees it: the images are larger


def test_a_killed_run_resumes_as_if_uninterrupted(done: Path, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """Sampled answers are the same; an incomplete batch is asked again."""
    whole = done.with_suffix(".answers.jsonl").read_text().splitlines(keepends=True)
    assert len(whole) == 1 + 5
    out = tmp_path / "results.json"
    out.with_suffix(".answers.jsonl").write_text("".join(whole[:4]) + whole[4][:20])
    assert ask(checkpoint, images, out, "--image-mode", "pad_black") == 0
    assert answers(out) == answers(done)
    assert out.with_suffix(".answers.jsonl").read_text() == "".join(whole)


def test_finished_answers_are_not_asked_for_again(done: Path, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "results.json", tmp_path / "results.answers.jsonl"
    lines = done.with_suffix(".answers.jsonl").read_text().splitlines()
    first = {**json.loads(lines[1]), "answer": "kept as it was"}
    log.write_text("\n".join([lines[0], json.dumps(first), *lines[2:]]) + "\n")
    assert ask(checkpoint, images, out, "--image-mode", "pad_black") == 0
    assert answers(out)[0] == "kept as it was"


def test_a_log_of_answers_can_be_scored(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = done.with_suffix(".answers.jsonl")
    assert cli.main(["eval", "vqa", "--predictions", str(log), "--json"]) == 0
    again, figures = json.loads(capsys.readouterr().out)["figures"], json.loads(done.read_text())["figures"]
    # The header has all settings but the path of the model.
    assert again == [{**figure, "model": None} for figure in figures]
    assert cli.main(["eval", "vqa", "--predictions", str(log), "--temperature", "0.9"]) == 0
    assert cli.main(["eval", "vqa", "--predictions", str(log), "--greedy"]) == 2
    assert "--temperature: contradicts" in capsys.readouterr().err
    assert cli.main(["eval", "vqa", "--predictions", str(log), "--adapter", "a"]) == 2
    assert "--adapter: it has no effect on the answers in" in capsys.readouterr().err


def test_settings_come_from_the_file_of_answers_and_from_the_options(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"model_hash": "abc", "prompt": "{question} Read.", "image_mode": "pad"}
    rows = [
        {"question_id": n, "text": "said", "model_id": "m", "metadata": {**how, "temperature": n}} for n in range(5)
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "vqa", "--dataset", str(images / "dataset.json"), "--predictions", str(answers), "--json"]
    assert cli.main([*command, "--batch-size", "4"]) == 0
    (figure, *_) = json.loads(capsys.readouterr().out)["figures"]
    # The temperatures differ, so there is no common value.
    assert figure.items() >= {**how, "model": "m", "temperature": None, "batch_size": 4}.items()
    assert cli.main([*command, "--greedy"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"][0]["decoding"] == "greedy"
    assert cli.main([*command, "--prompt", "{question}"]) == 2
    assert "--prompt: contradicts" in capsys.readouterr().err


def test_a_greedy_run_resumes_with_smaller_batches(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """As after running out of memory: greedy answers do not depend on the batch."""
    out = tmp_path / "results.json"
    assert ask(checkpoint, images, out, "--greedy") == 0
    expected, log = answers(out), out.with_suffix(".answers.jsonl")
    rows = json.loads((images / "dataset.json").read_text())["data"]
    shown = [images / "images" / row["image"] for row in rows]
    engine = load_chat(checkpoint, device="cpu").engine
    asked = [row["question"] for row in rows]
    assert expected == greedy_answers(engine.base_model, engine.processor, asked, shown, max_new_tokens=6)
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))
    assert ask(checkpoint, images, out, "--greedy", "--batch-size", "1") == 0
    assert answers(out) == expected


def test_sampled_answers_do_not_depend_on_the_batch(done: Path, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert ask(checkpoint, images, out, "--image-mode", "pad_black", "--batch-size", "5") == 0
    assert answers(out) == answers(done)


def test_other_settings_do_not_resume(
    done: Path, checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    shutil.copy(done.with_suffix(".answers.jsonl"), out.with_suffix(".answers.jsonl"))
    assert ask(checkpoint, images, out, "--image-mode", "pad_black", "--greedy") == 2
    assert "setting.temperature was 0.9 and is 0.0" in capsys.readouterr().err


def test_answers_of_other_storage_or_resolution_are_not_reused(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tiled = tmp_path / "results.json", tmp_path / "tiled"
    assert ask(checkpoint, images, out, "--greedy") == 0
    assert ask(checkpoint, images, out, "--greedy", "--quantize", "nf4") == 2
    assert "setting.quantize was None and is 'nf4'" in capsys.readouterr().err
    for number in (1, 2):
        model, processor = build_model(ModelConfig(checkpoint=str(checkpoint), resolution=Tiles(grid=((1, number),))))
        model.save_pretrained(tiled)
        processor.save_pretrained(tiled)
        assert ask(tiled, images, tmp_path / "tiled.json", "--greedy") == (0 if number == 1 else 2)
    assert "setting.resolution" in capsys.readouterr().err


def test_greedy_is_reported_as_such(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    assert ask(checkpoint, images, out, "--greedy", "--limit", "2", "--prompt", "{question} In a word.", "--json") == 0
    (figure, *_) = json.loads(capsys.readouterr().out)["figures"]
    assert (figure["decoding"], figure["temperature"], figure["records"]) == ("greedy", 0.0, 2)
    assert figure["top_k"] is None
    assert figure["prompt"] == "{question} In a word."
    assert ask(checkpoint, images, tmp_path / "other.json", "--greedy", "--temperature", "0.5") == 2
    assert ask(checkpoint, images, tmp_path / "other.json", "--prompt", "Read.") == 2


def test_images_are_checked_before_anything_is_asked(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "Q?", "answers": ["A"], "image": name} for name in ("../../secret.png", "gone.png")]
    (tmp_path / "dataset.json").write_text(json.dumps(rows))
    (tmp_path / "images").symlink_to(images / "images")
    assert ask(checkpoint, tmp_path, tmp_path / "results.json") == 2
    told = capsys.readouterr().err
    assert "secret.png: leads outside the image folders" in told
    assert "gone.png: is in none of" in told


def test_published_predictions_by_command(shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = shared_dir / "reference" / "vqa" / "STVQA.json"
    if not file.is_file():
        pytest.skip(f"the published predictions are not at {file}")
    command = ["eval", "vqa", "--predictions", str(file), "--metric", "multimodalocr", "--json"]
    assert cli.main([*command, "--out", str(tmp_path / "results.json")]) == 0
    (figure,) = json.loads(capsys.readouterr().out)["figures"]
    assert round(figure["value"], 2) == 39.16
    assert 37 < figure["low"] < 39.16 < figure["high"] < 41
    assert (figure["records"], figure["temperature"], figure["model_hash"]) == (5000, None, None)
    assert len(read_results(tmp_path / "results.json").records) == 5000


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--dataset", "d.json"],
        ["--predictions", "p.json", "--model", "m"],
        ["--predictions", "p.json", "--metric", "f1"],
    ],
)
def test_invalid_options_are_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "vqa", *arguments]) == 2
    assert "Fix: " in capsys.readouterr().err


def predictions(folder: Path, name: str, said: dict[str, str], *more: str) -> Path:
    """Four records with measures, answered as ``said``."""
    rows: list[dict[str, Any]] = [
        {"question_id": key, "question": f"What is {key}?", "answers": [truth], "prediction": said.get(key, truth),
         "dataset": kind, "box": box, "image_width": 672, "image_height": 336}
        for key, truth, kind, box in (
            ("a", "STOP", "signs", [0, 0, 100, 40]), ("b", "12", "signs", [300, 150, 360, 160]),
            ("c", "Привет", "papers", [600, 300, 660, 320]),
            ("d", "longer than the others", "papers", [0, 300, 90, 312]),
        )
    ]  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(rows))
    out = folder / f"{name}.results.json"
    assert cli.main(["eval", "vqa", "--predictions", str(folder / f"{name}.json"), "--out", str(out), *more]) == 0
    return out


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = predictions(tmp_path, "before", {"a": "GO", "c": "Пока", "d": "no"})
    after = predictions(tmp_path, "after", {"b": "13"})
    capsys.readouterr()
    assert cli.main(["eval", "compare", str(before), str(after), "--metric", "exact", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    whole = told["whole"]
    assert (whole["before"], whole["after"], whole["difference"]) == (25, 75, 50)
    assert (whole["gained"], whole["lost"], whole["p_value"]) == (3, 1, pytest.approx(2 * 5 / 16))
    assert whole["low"] <= 50 <= whole["high"]
    assert [(change["id"], change["gained"]) for change in told["changes"]] == [
        ("a", True), ("b", False), ("c", True), ("d", True),
    ]  # fmt: skip
    kinds = {(group["by"], group["name"]): (group["gained"], group["lost"]) for group in told["groups"]}
    assert kinds["dataset", "signs"] == (1, 1)
    assert kinds["dataset", "papers"] == (2, 0)
    assert kinds["letter height", "16-24 px"] == (1, 0)  # 40 pixels of an image twice as wide as the tower
    assert cli.main(["eval", "compare", str(before), str(after), "--metric", "cer"]) == 0
    shown = capsys.readouterr().out
    assert "gained a: What is a?" in shown
    assert "lost   b: What is b?" in shown


@pytest.mark.slow
def test_comparisons_and_diagnoses_show_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = predictions(tmp_path, "before", {"a": "GO"}, "--greedy", "--prompt", "{question} Read.")
    after = predictions(tmp_path, "after", {"b": "13"}, "--temperature", "0.9", "--prompt", "{question} Read.")
    capsys.readouterr()
    assert cli.main(["eval", "compare", str(before), str(after), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"] == {"temperature": [0, 0.9]}
    assert [told[side]["temperature"] for side in ("first", "second")] == [0, 0.9]
    assert told["first"]["prompt"] == "{question} Read."
    assert cli.main(["eval", "compare", str(before), str(after)]) == 0
    shown = capsys.readouterr().out
    assert "temperature: 0.0 in A, 0.9 in B" in shown
    assert "prompt: {question} Read. in both" in shown
    assert cli.main(["eval", "diagnose", str(after), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["setting"]["temperature"], told["dataset"]) == (0.9, str(tmp_path / "after.json"))
    assert cli.main(["eval", "diagnose", str(after)]) == 0
    assert "temperature: 0.9" in capsys.readouterr().out


def test_compare_rejects_other_questions(tmp_path: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = predictions(tmp_path, "before", {})
    assert cli.main(["eval", "compare", str(before), str(done)]) == 2
    assert "has no question in common" in capsys.readouterr().err
    assert cli.main(["eval", "compare", str(before), str(tmp_path / "before.json")]) == 2
    assert "cannot be read as results" in capsys.readouterr().err


def test_what_holds_no_results_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    results = predictions(tmp_path, "run/one", {})
    none = tmp_path / "none.results.json"
    none.write_text(json.dumps(json.loads(results.read_text()) | {"records": []}))
    for given, what in (
        (tmp_path / "empty", "is a folder, expected a results file"),
        (tmp_path / "run", f"Fix: give {results}."),
        (none, "contains no scored answers"),
        (tmp_path / "missing.json", "missing.json: no such file"),
    ):
        for command in (["eval", "compare", str(results), str(given)], ["eval", "diagnose", str(given)]):
            assert cli.main(command) == 2
            assert what in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "empty")]) == 2
    assert "holds neither steps of a run nor results" in capsys.readouterr().err
    assert not (tmp_path / "empty" / "report.html").exists()


def test_diagnose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = predictions(tmp_path, "one", {"b": "13"})
    capsys.readouterr()
    assert cli.main(["eval", "diagnose", str(results), "--metric", "exact", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    values = {(group["by"], group["name"]): (group["records"], group["value"]) for group in told["groups"]}
    assert values == {
        ("letter height", "4-6 px"): (1, 0), ("letter height", "6-8 px"): (1, 100),
        ("letter height", "8-12 px"): (1, 100), ("letter height", "16-24 px"): (1, 100),
        ("answer length", "below 4 letters"): (1, 0), ("answer length", "4-7 letters"): (2, 100),
        ("answer length", "16-31 letters"): (1, 100),
        ("script", "cyrillic"): (1, 100), ("script", "digits"): (1, 0), ("script", "latin"): (2, 100),
        ("position", "top left"): (1, 100), ("position", "middle centre"): (1, 0),
        ("position", "bottom left"): (1, 100), ("position", "bottom right"): (1, 100),
        ("dataset", "papers"): (2, 100), ("dataset", "signs"): (2, 50),
    }  # fmt: skip
    assert told["too_small"] == {"records": 2, "known": 4, "smallest": 7.0}
    assert cli.main(["eval", "diagnose", str(results), "--smallest", "5.5"]) == 0
    assert "1 of 4 records with known letter height, 25.0 %" in capsys.readouterr().out


@pytest.mark.slow
def test_synthetic_questions_are_grouped_automatically(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``synth``, ``eval vqa``, ``eval diagnose``, ``report`` keep heights and positions, also of distorted images."""
    drawn, out = tmp_path / "drawn", tmp_path / "results.json"
    assert cli.main(["synth", "--out", str(drawn), "--n", "8", "--task", "question", "--distort", "light"]) == 0
    asked = ["--dataset", str(drawn / "records.json"), "--images", str(drawn / "images"), "--model", str(checkpoint)]
    assert cli.main(["eval", "vqa", *asked, "--greedy", "--max-new-tokens", "4", "--out", str(out)]) == 0
    records = read_results(out).records
    assert all(record.letter_height and record.position for record in records)
    capsys.readouterr()
    assert cli.main(["eval", "diagnose", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"letter height", "position", "kind"} <= {group["by"] for group in told["groups"]}
    assert told["too_small"]["known"] == 8
    page = tmp_path / "page.html"
    shown = ["report", "--results", str(out), "--images", str(drawn / "images"), "--out", str(page)]
    assert cli.main(shown) == 0
    assert page.read_text(encoding="utf-8").count("<img") == 8
