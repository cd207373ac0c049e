"""The benchmarks work, and what they compare gives the same numbers. Times are not looked at."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import TrainerCallback

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The inputs, with the scripts importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import weights_inputs

    weights_inputs.write_inputs(tmp_path / "tiny", "tiny")
    return tmp_path / "tiny"


def test_every_contender_gives_what_ours_gives(tiny: Path, tmp_path: Path) -> None:
    import weights
    import weights_check
    import weights_contenders

    assert {task: tuple(names) for task, names in weights_contenders.CONTENDERS.items()} == weights.CONTENDERS
    for task, contenders in weights_contenders.CONTENDERS.items():
        (tmp_path / task).mkdir()
        for name, contender in contenders.items():
            contender(tiny, tmp_path / task / name)
        ours, peer, *_, loop, copied = (tmp_path / task / name for name in contenders)
        base = tiny / "checkpoint" if task == "merge" else None
        assert weights_check.compare(ours, peer, base)["equal"]
        assert not weights_check.compare(ours, loop, base)["equal"]
        source = tiny / {"make": "target", "apply": "delta", "merge": "checkpoint"}[task]
        assert [(source / path.name).read_bytes() for path in copied.iterdir()] == [
            path.read_bytes() for path in copied.iterdir()
        ]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LLAVAR_BENCHMARKS") != "all", reason="LLAVAR_BENCHMARKS=all runs this command")
def test_a_dry_run_takes_no_disk(tiny: Path, tmp_path: Path) -> None:
    import weights_dry_run
    from weights_inputs import SHAPES

    found = weights_dry_run.dry_run(tmp_path, tiny, SHAPES["small"])
    assert found["bytes"]["delta"] == pytest.approx(333_650_000, rel=1e-3)
    assert found["written"] == pytest.approx(found["bytes"]["delta"], rel=1e-3)
    assert found["asked"] >= sum(found["bytes"].values())
    assert found["disk"] < found["written"] / 10
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LLAVAR_BENCHMARKS") != "all", reason="LLAVAR_BENCHMARKS=all runs this command")
def test_the_command(tmp_path: Path) -> None:
    arguments = ["--size=tiny", "--rounds=1", "--tasks", "make", f"--work={tmp_path}", f"--out={tmp_path / 'found'}"]
    command = [sys.executable, str(BENCHMARKS / "weights.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "found.json").read_text())
    assert list(report["rounds"][0]["make"]) == ["ours", "in memory", "loop", "copy"]
    assert report["checks"][0]["make"]["equal"]
    assert done.stdout == (tmp_path / "found.md").read_text()
    assert "| make: ours |" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.md"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("scripts")
def test_text_and_images_are_those_of_the_original(tmp_path: Path) -> None:
    import data
    from data_table import table

    model = Path(__file__).parent / "golden/tokenization/small/tokenizer.model"
    report: dict[str, Any] = {
        "text": data.text(model, count=8, rounds=2),
        "images": data.images(tmp_path / "images", count=6, rounds=2),
    }
    assert report["text"]["differ"] == report["images"]["differ"] == 0
    assert report["text"]["tokens"] > 8 * data.IMAGE_TOKENS
    found = {how: {key: [0.01] * 3 for key in ("open_s", "private_mib", "us_per_record")} for how in data.HOW}
    report.update(data.about(), date="", command="", rounds=2, load_before=[0.0], load_after=[0.0])
    printed = table({**report, "records": {"records": 1, "bytes": 1, "found": found}})
    assert "ids and labels the same in all of 8" in printed
    assert "not measured" in table({**report, "text": None, "records": {"records": 1, "bytes": 1, "found": found}})


@pytest.mark.usefixtures("scripts")
def test_records_are_opened_in_each_way(tmp_path: Path) -> None:
    import data_records

    data_records.write_records(tmp_path / "records.json", 20_000)
    for how in ("json.load", "index, first time", "index, again"):
        assert set(data_records.measure(how, tmp_path / "records.json")) == {"open_s", "private_mib", "us_per_record"}
    assert (tmp_path / "records.json.index").is_file()


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [float(logs["loss"])] if "loss" in logs else []


@pytest.mark.slow
@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("stage", ["stage1", "stage2", "lora"])
def test_contenders_of_the_training_have_the_same_losses(stage: str, tmp_path: Path) -> None:
    from train_contenders import LENGTHS, Cell, contender
    from train_model import SHAPES, Records

    shape, losses = SHAPES["tiny"], {}
    records = Records(LENGTHS[stage], 6, shape)
    for name in ("original", "ours", "all logits", "whole tower"):
        cell = Cell(stage=stage, shape=shape, batch=2, steps=3, folder=tmp_path / name)
        callback = _Losses()
        contender(name, cell, records, callback).train()
        losses[name] = callback.losses
    assert len(losses["original"]) == 3
    assert len(set(losses["original"])) == 3
    for found in losses.values():
        assert found == pytest.approx(losses["original"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("scripts")
def test_the_gpu_benchmark_runs_where_there_is_none() -> None:
    pytest.importorskip("bitsandbytes")
    import train_cell

    plain = {"size": "tiny", "steps": 3, "lengths": "stage2", "longest": None, "recompute": "auto", "cap_gib": None}
    for cell in (
        {"name": "stage1", "rank": None, "quantize": None, "batch": 2},
        {"name": "QLoRA", "rank": 4, "quantize": "nf4", "batch": 1, "longest": 256, "recompute": True},
    ):
        found = train_cell.measure({**plain, **cell})
        assert found["tokens_per_second"] > 0
        assert found["flops_per_second"] > 0


@pytest.mark.usefixtures("scripts")
def test_flops_of_a_llama_are_those_by_hand() -> None:
    """6.6e9 weights in the layers of a 7B, each multiplied and added forward and backward to the input."""
    from train_cell import flops
    from train_model import SHAPES, Records

    (item,) = Records("stage2", 1, SHAPES["7b"], longest=2048)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    frozen = flops("7b", [item], rank=None)
    assert frozen == pytest.approx(4 * weights * 2048, rel=0.1)
    assert frozen < flops("7b", [item], rank=128) < 1.1 * frozen


@pytest.mark.usefixtures("scripts")
def test_the_cells_of_a_gpu_end_within_nine_minutes() -> None:
    """Each is given up after its share; at a fifth of the peak, its computation takes less than half of that."""
    from train_cell import flops
    from train_model import SHAPES, Records

    spec = importlib.util.spec_from_file_location("gpu_train", BENCHMARKS / "gpu/train.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for size in ("7b", "13b"):
        cells = script.cells(size, 12)
        assert len(cells) * script.CELL_SECONDS < 9 * 60
        for cell in cells:
            records = Records(cell["lengths"], cell["batch"] * 12, SHAPES[size], longest=cell["longest"])
            seconds = flops(size, records, rank=cell["rank"]) / (0.2 * script.PEAK_TFLOPS * 1e12)
            assert seconds < script.CELL_SECONDS / 2, (cell["name"], seconds)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LLAVAR_BENCHMARKS") != "all", reason="LLAVAR_BENCHMARKS=all runs this command")
@pytest.mark.usefixtures("scripts")
def test_the_command_that_trains_in_turns(tmp_path: Path) -> None:
    arguments = ["--small", "--stages=lora", "--rounds=1", f"--out={tmp_path / 'found'}"]
    command = [sys.executable, str(BENCHMARKS / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "found.json").read_text())
    found = report["speed"][0]["found"]
    assert list(found) == ["original", "original, keeping", "ours, recomputing", "ours", "trl"]
    assert all(len(found[name]["cpu"]) == len(found[name]["losses"]) == 2 for name in ("original", "ours"))
    assert all(found[name]["peak"] > found[name]["imports"] > 0 for name in ("original", "ours"))
    assert done.stdout.endswith((tmp_path / "found.md").read_text())  # DeepSpeed, where there is one, prints first
    assert "| each by default |" in done.stdout


@pytest.mark.slow
def test_every_way_of_asking_gives_the_originals_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import inference
    import inference_inputs
    import inference_table
    import inference_work

    asked = inference_inputs.write_questions(tmp_path / "data", 3)
    inference_inputs.write_model(tmp_path / "model", "tiny")
    given = (str(tmp_path / "model"), tmp_path / "data")
    found = inference.compare_questions([inference_work.measure_questions(*given, tmp_path, 6, (1, 2))])
    assert {name: one["same"] for name, one in found.items()} == {"original": 3, "batch 1": 3, "batch 2": 3}
    turns = inference.compare_turns(inference_work.measure_turns(*given, tokens=6, conversations=2))
    assert (turns["same"], turns["of"]) == (2, 2)
    contenders = {"bfloat16": ("bfloat16", None), "float32": ("float32", None), "nf4": ("bfloat16", "nf4")}
    ways = {name: inference_work.measure_storage(*given, 6, *way) for name, way in contenders.items()}
    assert {name: one["dtype"] for name, one in ways.items()} == {
        name: dtype for name, (dtype, _) in contenders.items()
    }
    assert ways["nf4"]["weights"] < ways["bfloat16"]["weights"] < 0.6 * ways["float32"]["weights"]
    assert ways["float32"]["texts"] == found_texts(tmp_path / "original.jsonl")
    storage = json.loads(json.dumps(inference.compare_storage(ways, [one["answer"] for one in asked])))
    assert inference.agree(ways["nf4"], ways["nf4"]) == {"same": 3, "tokens": 1.0}
    assert set(storage["agreement"]) == {"bfloat16", "float32"}
    lines = inference_table.run_table({**ABOUT, "questions": found, "turns": turns, "storage": storage}).splitlines()
    assert sum(line.endswith("| 3 of 3 |") for line in lines) == 3


def found_texts(answers: Path) -> list[str]:
    return [json.loads(line)["text"] for line in answers.read_text().splitlines()]


ABOUT = {
    "date": "2026-01-01", "command": "python", "packages": {}, "python": "3", "threads": "1", "model": "tiny",
    "machine": {"cores": 1, "memory": 2**30, "system": "Linux", "kind": "x86_64", "gpu": None},
    "load_before": 0.0, "load_after": 0.0,
}  # fmt: skip


def test_a_command_is_told_without_this_machines_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import inference

    typed = ["--model", str(tmp_path / "mine"), "--out", "results/found", f"--work={tmp_path / 'here'}"]
    assert inference.command_line(typed) == (
        "python benchmarks/inference.py --model mine --out results/found --work=here"
    )


class _Turn(TrainerCallback):
    """Makes each step at once, where the benchmark's own waits for its turn."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


@pytest.mark.slow
@pytest.mark.usefixtures("scripts")
def test_the_benchmark_of_resolutions_runs_each_of_them(tmp_path: Path) -> None:
    import resolution
    import resolution_work as work
    from resolution_table import resolution_table
    from turns import Steps

    # 2 x 2 tiles of 24 x 24 patches with a token at the end of each row, the whole image, and two tokens around both.
    counts = [work.image_tokens(name, work.SHAPE) for name in work.SETTINGS]
    assert counts[:4] == [576 + 2, 1176 + 2, 576 + 48 * 49 + 2, 576 + 72 * 73 + 2]
    done = {}
    for name in work.SETTINGS:
        for kind in ("prefill", "train"):
            turn: Any = _Turn()
            work.make(name, work.Task(kind, work.TINY, 2, tmp_path), turn).train()
            assert turn.steps == 2, (name, kind)
        done[name] = Steps(cpu=[9.0, 2.0, 4.0], imports=1.0, peak=3.0)
    done["tiles: 1 + 4"] = Steps(cpu=[9.0, 4.0, 12.0], imports=1.0, peak=11.0)
    measured = {"time": resolution.time_ratios(done), "memory": resolution.memory_ratios(done)}
    kinds = {"prefill": measured, "train": measured}
    about = {**ABOUT, "rounds": 2, "load_before": [3.0], "load_after": [0.0], "seconds": 1.0, "text": work.TEXT}
    tokens = dict(zip(work.SETTINGS, counts, strict=True))
    printed = resolution_table({**about, **kinds, "image_tokens": tokens})
    assert "| tiles: 1 + 4 | 2,930 | 2.50 (2.00–3.00) | 5.00 (0 MiB) |" in printed
    assert "The machine was not idle" in printed


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LLAVAR_BENCHMARKS") != "all", reason="LLAVAR_BENCHMARKS=all runs this command")
@pytest.mark.usefixtures("scripts")
def test_the_estimates_of_resolutions_are_of_real_sizes() -> None:
    import resolution_estimates

    names = ("the whole image only", "tiles: 1 + 4", "cross_attention, grid: 4")
    found = {name: resolution_estimates.estimate("7b", name) for name in names}
    plain, tiles, crossed = found.values()
    assert (plain.record_tokens, tiles.record_tokens) == (2048, 2048 + 2928 - 576)
    assert plain.qlora < tiles.qlora < crossed.qlora
    assert plain.flops < crossed.flops < tiles.flops
    assert "| tiles: 1 + 4 | 2,928 | 4,400 |" in resolution_estimates.table({"7b": found})


def test_the_start_up_is_compared_in_the_same_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import startup

    assert set(startup.GOALS) < set(startup.processes(tmp_path))
    assert "learing_rate" in (tmp_path / "typo.yaml").read_text(encoding="utf-8")
    times = {startup.BARE: [0.1, 0.2], "--help": [0.3, 0.6], startup.IMPORTS: [2.0, 3.0], "first token": [4.0, 6.0]}
    assert startup.over(times, "--help") == pytest.approx([0.3, 0.2, 0.4])
    steps = {"3": {"spin": [{"wall": 2.0, "cpu": 1.0}], "sleep": [{"wall": 1.0, "cpu": 0.5}]}}
    machine = {"cores": 2, "memory": 2**34, "system": "Linux", "kind": "x86_64"}
    report = {
        "date": "", "command": "", "machine": machine, "packages": {}, "python": "3.11", "threads": "1",
        "load_before": [0.0], "load_after": [0.0], "rounds": 2, "seconds": 60.0, "times": times, "steps": steps,
    }  # fmt: skip
    table = startup.startup_table(report)
    assert "| --help | 0.45 (0.30–0.60) | python -c pass | 0.30 (0.20–0.40) | 0.3: met |" in table
    assert f"| first token | 5.00 (4.00–6.00) | {startup.IMPORTS} | 2.50 (2.00–3.00) | 1.5: missed |" in table
    assert "| threads sleep while they wait | 3 | 1.000 (1.000–1.000) | 0.500 (0.500–0.500) |" in table


@pytest.mark.usefixtures("scripts")
def test_the_limit_of_training_is_the_time_of_products() -> None:
    import train_limit

    names = ("aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::add", "step")
    assert [train_limit.is_product(name) for name in names] == [True, True, False, False]
    cells = [
        {"stage": "lora", "original": {"whole": [4.0, 4.0], "products": [1.0, 1.0]},
         "ours": {"whole": [2.0, 2.0], "products": [1.0, 1.0]}, "now": [2.0, 2.0, 2.0], "limit": [4.0, 4.0, 4.0]},
    ]  # fmt: skip
    about = {**ABOUT, "rounds": 2, "load_before": [0.0], "load_after": [0.0], "seconds": 1.0, "cells": cells}
    assert "| lora | 25% | 50% | 2.00 (2.00–2.00) | 4.00 (4.00–4.00) |" in train_limit.table(about)


@pytest.mark.usefixtures("scripts")
def test_the_table_of_stored_4_bits_compares_with_quantizing() -> None:
    import open_quantized

    first, second = open_quantized.CONTENDERS
    found = {
        first: {"cpu": [2.0, 4.0], "wall": [3.0, 3.0], "bytes": 4_000_000},
        second: {"cpu": [1.0, 1.0], "wall": [3.0, 3.0], "bytes": 1_000_000},
    }
    about = {**ABOUT, "rounds": 2, "load_before": [0.0], "load_after": [0.0], "seconds": 1.0, "conversion": 2.0}
    printed = open_quantized.quantized_table({**about, "layers": 8, "width": 1024, "found": found})
    figures = "1.00 (1.00–1.00) | 0.38 (0.25–0.50) | 3.00 (3.00–3.00) | 1.00 (1.00–1.00) | 1.0 | 0.25"
    assert f"| {second} | {figures} |" in printed


@pytest.mark.usefixtures("scripts")
def test_the_table_of_ocr_compares_with_the_builder() -> None:
    import ocr
    import ocr_table

    def reading(seconds: float, found: int) -> dict[str, dict[str, Any]]:
        return {"receipts": {"seconds": seconds, "found": found, "there": 50}}

    rounds = [
        {"ours": reading(1, 50), "as before": reading(before, 49), "RapidOCR": reading(1.1, 40)} for before in (2.5, 2)
    ]
    about = {**ABOUT, "rounds": 2, "pages": 4, "load_before": [3.0], "load_after": [0.0], "seconds": 1.0}
    printed = ocr_table.table({**about, "kinds": ocr.compare(rounds)})
    before = "the builder, with denormal numbers and short lines padded"
    assert "| receipts | the builder | 1.00 (1.00–1.00) | 1 | 100.0 % |" in printed
    assert f"| receipts | {before} | 2.25 (2.00–2.50) | 2.25 (2.00–2.50) | 98.0 % |" in printed
    assert "no result (1.10–1.10) | 80.0 % |" in printed
    assert "receipts met" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("scripts")
def test_readers_of_ocr_find_the_words_of_a_page(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    import ocr

    (tmp_path / "truth.json").write_text(json.dumps({"blank_0.png": "There is\nnothing"}))
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank_0.png")
    for contender in ("ours", "RapidOCR"):
        found = ocr.read_pages(contender, tmp_path)["blank"]
        assert (found["found"], found["there"]) == (0, 3), contender
