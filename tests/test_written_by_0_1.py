"""Files written by version 0.1 open, resume and give the same results: see make_files.py next to the archive."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llavar_peft import load_chat, load_recipe
from llavar_peft.cli import main

ARCHIVE = Path(__file__).parent / "fixtures/written_by_0_1/files.tar.xz"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # paths in these files are relative
    return tmp_path


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def metrics(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "stage2/metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_recipes_open(files: Path) -> None:
    typed, resolved = load_recipe(files / "mine.yaml"), load_recipe(files / "run/recipe.yaml")
    assert typed == resolved


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_result(files: Path) -> None:
    assert len(metrics(files / "interrupted")) < 24
    run("train", "mine.yaml", "output_dir=interrupted")
    assert metrics(files / "interrupted") == metrics(files / "run")
    expected, resumed = weights(files / "run/adapter"), weights(files / "interrupted/adapter")
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_finished_run_is_finished(files: Path) -> None:
    before = (files / "run/adapter/adapter_model.safetensors").read_bytes()
    run("train", "mine.yaml")
    assert (files / "run/adapter/adapter_model.safetensors").read_bytes() == before
    assert (files / "run/index.html").is_file()


def test_an_adapter_opens_and_merges(files: Path) -> None:
    run("adapter", "verify", "run/adapter", "--base", "run/stage1/model")
    run("merge", "--base", "run/stage1/model", "--adapter", "run/adapter", "--out", "again")
    expected, again = weights(files / "merged"), weights(files / "again")
    assert expected.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    image = next((files / "data/images").rglob("*.png"))
    assert isinstance(load_chat("again").ask(image, "Read.", max_new_tokens=2), str)


def test_a_delta_applies(files: Path) -> None:
    run("delta", "verify", "--base", "language_model", "--delta", "delta", "--target", "merged")
    run("delta", "apply", "--base", "language_model", "--delta", "delta", "--out", "applied")


def test_answers_and_results_open(files: Path) -> None:
    before = (files / "answers.jsonl").read_text()
    options = ("--max-new-tokens", 4, "--temperature", 0.2)
    run("generate", "--model", "merged", "--questions", "questions.jsonl", "--images", "data/images", "--answers",
        "answers.jsonl", *options)  # fmt: skip
    assert (files / "answers.jsonl").read_text() == before
    run("eval", "compare", "results.json", "results.json")
    run("eval", "diagnose", "results.json")
    run("report", "run", "--results", "results.json", "--images", "data/images")
