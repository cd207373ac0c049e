"""The README's commands, run in order as they stand there; only what they are given is tiny."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import llavar_peft
from llavar_peft import ModelConfig, build_model, make_delta
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from tests.commands import command, python

ROOT = Path(llavar_peft.__file__).parents[1]
PARTS = Path(llavar_peft.__file__).parent / "assets/tiny"
ELSEWHERE = {
    "pip install": "the machine is set up already",
    "python -m pytest": "this is it",
    "llavar-peft quickstart": "tests/test_quickstart.py",
    "llavar-peft eval": "tests/evaluation; its data is other people's",
    "llavar-peft report": "tests/evaluation/test_report.py",
    "lmms-eval": "tests/evaluation",
    "llavar-peft ocr": "tests/data/ocr",
    "llavar-peft serve": "tests/serving",
    "python examples/openai_client.py": "tests/serving/test_api.py",
    "llavar-peft synth": "tests/data/test_synth.py, test_synth_plain.py",
    "accelerate launch": "tests/test_examples.py; this one takes eight GPUs",
}
"""How commands begin that are not run here, and why."""


def _blocks(text: str) -> tuple[list[str], list[str]]:
    """The commands, each on one line, and the blocks of Python."""
    python = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    indented = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") and "```" not in line)
    lines = indented.replace("\\\n", " ").splitlines()
    known = re.compile(r"^(llavar-peft|accelerate|pip|python) ")
    return [line for line in lines if known.match(line)], python


def _furnish(folder: Path) -> None:
    """Put down whatever the README takes for granted."""
    shutil.copytree(PARTS / "language_model", folder / "llama-13b")
    shutil.copytree(PARTS / "vision_tower", folder / "clip-vit-large-patch14-336")
    shutil.copytree(PARTS / "vision_tower", folder / "openai/clip-vit-large-patch14-336")
    shutil.copytree(PARTS / "language_model", folder / "lmsys/vicuna-7b-v1.1")
    model, processor = build_model(
        ModelConfig(language_model=str(folder / "llama-13b"), vision_tower=str(PARTS / "vision_tower"), dtype="float32")
    )
    model.save_pretrained(folder / "trained")
    processor.save_pretrained(folder / "trained")
    make_delta(folder / "llama-13b", folder / "trained", folder / "LLaVAR_delta")
    write_synthetic(folder / "drawn", 8, SynthSettings(style="plain", seed=1, task="question"))
    drawn = folder / "drawn/images"
    for records, images in (
        ("receipts.json", "receipts"),
        ("chat_llavar.json", "cc3m"),
        ("llava_instruct_150k_llavar_16k.json", "coco/train2017"),
    ):
        shutil.copyfile(folder / "drawn/records.json", folder / records)
        shutil.copytree(drawn, folder / images)
    shutil.copyfile(next(drawn.iterdir()), folder / "poster.png")
    shutil.copytree(drawn, folder / "images")
    question = {"question_id": 0, "image": next(drawn.iterdir()).name, "text": "Read.", "category": "conv"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the repository")
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _furnish(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines, blocks = _blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    here = [line for line in lines if not line.startswith(tuple(ELSEWHERE))]
    assert len(here) >= 15
    for line in here:
        if "--tokenizer" in line:  # copied as it is; the tiny model has none, and LLaMA's is not ours to give
            (tmp_path / "llama-13b/tokenizer.model").write_bytes(b"LLaMA's")
        typed, _, into = line.partition(" > ")
        program, *words = shlex.split(typed)
        assert program == "llavar-peft"
        done = command(words, tmp_path)
        assert done.status == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        if into:
            # A CPU without instructions for bfloat16 takes ten times as long with it.
            told = done.stdout.replace("precision: bf16", "precision: fp32")
            (tmp_path / into).write_text(told, encoding="utf-8")
    for name in ("llavar-13b", "runs/mine/model", "runs/receipts/adapter", "merged", "receipts-delta", "mine-released"):
        assert (tmp_path / name).is_dir(), name

    shutil.rmtree(tmp_path / "runs/receipts")
    assert len(blocks) == 2
    for block in blocks:
        done = python(block, tmp_path)
        assert done.status == 0, done.stderr[-2000:]
    assert (tmp_path / "runs/receipts/adapter/adapter_model.safetensors").is_file()


def test_every_measured_figure_is_one_that_a_benchmark_printed() -> None:
    """Each row of the README's tables is a row, or some columns of one, of a committed result."""
    printed = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for path in (ROOT / "benchmarks/results").glob("*.md")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    measured = (ROOT / "README.md").read_text(encoding="utf-8").split("## Measured")[1]
    rows = [line.strip("|").split("|") for line in measured.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    for row in rows:
        first, *others = (cell.strip() for cell in row)
        assert any(first == found[0] and set(others) <= set(found) for found in printed), row
