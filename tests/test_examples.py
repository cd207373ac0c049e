"""The examples run as they stand."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from llavar_peft import ModelConfig, build_model
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.weights.io.convert_layout import VLLM_IDENTITY
from tests.weights.adapters import save_wide_model

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PARTS = ROOT / "llavar_peft/assets/tiny"


@pytest.mark.slow
def test_two_stages_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported everything."""
    for number, task in ((1, "transcribe"), (2, "conversation")):
        write_synthetic(tmp_path / f"data{number}", 4, SynthSettings(style="plain", seed=number, task=task))  # type: ignore[arg-type]
    arguments = [
        f"--language-model={PARTS / 'language_model'}",
        f"--vision-tower={PARTS / 'vision_tower'}",
        *(f"--stage{n}={tmp_path / f'data{n}/records.json'}" for n in (1, 2)),
        *(f"--stage{n}-images={tmp_path / f'data{n}/images'}" for n in (1, 2)),
        f"--output-dir={tmp_path / 'run'}",
        "--max-steps=1",
    ]
    monkeypatch.setattr(sys, "argv", ["two_stage.py", *arguments])
    runpy.run_path(str(EXAMPLES / "two_stage.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run/model")
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("LLAVAR_EXAMPLES") != "all", reason="LLAVAR_EXAMPLES=all runs it; a notebook is like it"
)
def test_from_images_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way on eight images; in this process, which has imported everything."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(sys, "argv", ["ocr_to_model.py", f"--out={tmp_path}", "--pages=8", "--steps=1"])
    runpy.run_path(str(EXAMPLES / "ocr_to_model.py"), run_name="__main__")
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    build = summary["build"]
    assert build["images"] == 8
    assert build["kept"] + sum(build["dropped"].values()) == 8
    assert build["kept"] >= 6
    figures = summary["percent, 95 % interval"]
    assert all(low <= value <= high for each in figures.values() for value, low, high in each.values())
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "after pretrain" in page
    assert "after finetune" in page
    assert "data:image/" in page


@pytest.mark.slow
def test_small_print_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that was not trained, on a few images; the models are tuned in several calls."""
    model, processor = build_model(
        ModelConfig(
            language_model=str(PARTS / "language_model"), vision_tower=str(PARTS / "vision_tower"), dtype="float32"
        )
    )
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    settings = [f"--out={tmp_path}", f"--start={tmp_path / 'start'}", "--images=4", "--unseen=2"]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    letters = ("cross-attention-2", "tiles-4x4-pooled", "tiles-2x2", "plain")
    for what, name in (*(("letters", name) for name in letters), ("receipts", "tiles-2x2")):
        argv = ["small_print.py", what, *settings, f"--models={name}", "--heights", "5", "12"]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(EXAMPLES / "small_print.py"), run_name="__main__")
    curves = json.loads((tmp_path / "letters.heights.json").read_text(encoding="utf-8"))["curves"]
    assert [curve["name"] for curve in curves] == ["plain", "tiles-2x2", "tiles-4x4-pooled", "cross-attention-2"]
    found = {(point["height"], point["questions"]) for curve in curves for point in curve["points"]}
    assert found == {(5.0, 2), (12.0, 2)}
    assert "<svg" in (tmp_path / "letters.heights.html").read_text(encoding="utf-8")
    records = json.loads((tmp_path / "sheets/records.json").read_text(encoding="utf-8"))
    answers = [turn["value"] for record in records for turn in record["conversations"][1::2]]
    assert max(map(len, answers)) <= 5
    assert not any(one == other for answer in answers for one, other in pairwise(answer))
    assert all(record["conversations"][0]["value"].startswith("<image>\n") for record in records)
    grids = json.loads((tmp_path / "receipts-tiles-2x2/model/config.json").read_text(encoding="utf-8"))["resolution"]
    assert grids["grid"] == [[2, 3], [3, 3], [4, 3]]
    assert json.loads((tmp_path / "receipts.json").read_text(encoding="utf-8"))["tiles-2x2"]["asked"] == 2
    assert json.loads((tmp_path / "letters.cut.json").read_text(encoding="utf-8")).keys() == {*letters}
    words = json.loads((tmp_path / "words-2-2/records.json").read_text(encoding="utf-8"))
    assert {len(record["conversations"][1]["value"]) for record in words} == {2}
    assert (tmp_path / "cross-attention-2-words-2-2/model").is_dir()
    text = json.loads((tmp_path / "tiles-4x4-pooled/model/config.json").read_text(encoding="utf-8"))["text_config"]
    assert text["max_position_embeddings"] == 4096


@pytest.mark.slow
def test_vllm_is_given_the_stock_export(tmp_path: Path) -> None:
    """With a vLLM that tells what it was asked for; tests/serving/test_engines.py runs the real one."""
    told = tmp_path / "vllm"
    told.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    told.chmod(0o755)
    save_wide_model(tmp_path / "model")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    asked: dict[str, list[str]] = {}
    for rank in ("0", "1"):
        environment = {**os.environ, "PATH": path, "API_KEY": "k", "RANK": rank, "GPUS": "4", "HEAD": "10.0.0.1"}
        environment["NATIVE"] = rank
        command = ["bash", str(EXAMPLES / "vllm.sh"), str(tmp_path / "model")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        asked[rank] = done.stdout.splitlines()
    assert json.loads((tmp_path / "model-vllm/config.json").read_text())["model_type"] == "llava"
    for words in asked.values():
        assert words[words.index("--data-parallel-size") + 1] == "8"
        assert str(tmp_path / "model-vllm") in words
    assert "--headless" not in asked["0"]
    assert [words[words.index("--model-impl") + 1] for words in asked.values()] == ["transformers", "vllm"]
    overrides = json.loads(asked["1"][asked["1"].index("--hf-overrides") + 1])
    assert overrides == {"projector_hidden_act": VLLM_IDENTITY}
    assert "--hf-overrides" not in asked["0"]
    assert asked["1"][asked["1"].index("--data-parallel-start-rank") + 1] == "4"


_SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" > "$SLURM_STUB/requeued"; fi
"""
_SRUN = """#!/usr/bin/env bash
shift
pids=()
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!)
done
echo "${pids[@]}" > "$SLURM_STUB/pids.part" && mv "$SLURM_STUB/pids.part" "$SLURM_STUB/pids"
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""


@pytest.mark.slow
def test_slurm_starts_the_ranks_and_puts_an_interrupted_job_back(tmp_path: Path) -> None:
    """With a Slurm of two processes on this machine; they shard as two nodes' would, by gloo."""
    for name, text in (("scontrol", _SCONTROL), ("srun", _SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    write_synthetic(tmp_path / "data", 8, SynthSettings(style="plain", seed=1, task="transcribe"))
    run = tmp_path / "run"
    settings = [
        f"output_dir={run}",
        f"model.language_model={PARTS / 'language_model'}",
        f"model.vision_tower={PARTS / 'vision_tower'}",
        *(f"stages.{n}.data.records={tmp_path / 'data/records.json'}" for n in (0, 1)),
        *(f"stages.{n}.data.images={tmp_path / 'data/images'}" for n in (0, 1)),
        *(f"stages.{n}.{name}" for n in (0, 1) for name in ("data.holdout=0", "data.workers=0", "epochs=500")),
        *(f"stages.{n}.{name}" for n in (0, 1) for name in ("global_batch_size=4", "micro_batch_size=2")),
    ]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_STUB": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "1", "ACCELERATE_MIXED_PRECISION": "no",
    }  # fmt: skip
    command = ["bash", str(EXAMPLES / "slurm.sh"), "tiny", *settings]
    metrics, deadline = run / "pretrain/metrics.jsonl", time.monotonic() + 600
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        while not (metrics.is_file() and metrics.read_text()) and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in (tmp_path / "pids").read_text().split():
            os.kill(int(pid), signal.SIGTERM)
        _, told = job.communicate(timeout=600)
    assert job.returncode == 4, told[-2000:]
    assert (tmp_path / "requeued").read_text().split() == ["requeue", str(os.getpid())]
    (checkpoint,) = (run / "pretrain").glob("checkpoint-*")
    assert len(list(checkpoint.glob("optimizer_*_of_2.safetensors"))) == 2


@pytest.mark.slow
def test_accelerate_launches_the_package() -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(EXAMPLES / "accelerate/cpu.yaml"),
    ]
    done = subprocess.run([*command, "-m", "llavar_peft", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("llavar-peft ")


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_knows_every_setting(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(path))
    assert settings.num_processes == yaml.safe_load(path.read_text())["num_processes"]
