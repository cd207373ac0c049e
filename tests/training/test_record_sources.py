"""Records from anywhere train alike: the same steps from messages in a table as from conversations in a file."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llavar_peft import DataConfig, Projector, Recipe, Trainer, build_model, cli
from llavar_peft.errors import InterruptedRunError, LlavarError
from llavar_peft.preflight.estimate_compute import count_steps, measure_records
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.schema import ColumnNames, DataSource
from llavar_peft.training.checkpoint_folders import hash_inputs
from llavar_peft.training.stage_records import record_files, stage_records
from tests.data.test_record_tables import TURNS_TYPE


class _SignalAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def _rows(recipe: Recipe) -> tuple[list[dict[str, Any]], Path]:
    data = recipe.stages[0].data
    return json.loads(Path(str(data.records)).read_text()), Path(str(data.images))


def _as_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a conversation as messages whose image is a part."""
    (question, answer) = record["conversations"]
    shown = question["value"].replace("<image>", "").strip()
    first = question["value"].startswith("<image>")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": shown}]
    content = parts if first else parts[::-1]
    reply = [{"type": "text", "text": answer["value"]}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]


def _write_table(rows: list[dict[str, Any]], images: Path, path: Path) -> None:
    pq.write_table(
        pa.table({
            "id": [row["id"] for row in rows],
            "messages": [_as_messages(row) for row in rows],
            "images": [[{"bytes": (images / row["image"]).read_bytes(), "path": row["image"]}] for row in rows],
        }),
        path,
    )  # fmt: skip


def _train(recipe: Recipe, callbacks: tuple[TrainerCallback, ...] = ()) -> Path:
    model, processor = build_model(recipe.model, seed=recipe.seed)
    return Trainer(model, processor, recipe, callbacks=callbacks).train()


def _figures(recipe: Recipe) -> list[tuple[int, float, int]]:
    lines = (Path(recipe.output_dir) / recipe.stages[0].name / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["tokens"]) for line in map(json.loads, lines)]


def _one_stage(recipe: Recipe, data: DataConfig, out: Path, **changes: Any) -> Recipe:
    stage = dataclasses.replace(recipe.stages[0], data=data, tune=Projector(), **changes)
    return dataclasses.replace(recipe, stages=(stage,), output_dir=str(out))


@pytest.fixture
def mixed(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """8 rows of a CSV file, 6 in a table with their images, and 4 of a file that names its own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows, images = _rows(tiny_recipe)
    with (tmp_path / "one.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")
        table.writerow(["id", "image", "frage", "answer"])
        table.writerows(
            [row["id"], row["image"], *(turn["value"] for turn in row["conversations"])] for row in rows[:8]
        )
    _write_table(rows[8:14], images, tmp_path / "two.parquet")
    (tmp_path / "own").mkdir()
    for row in rows[14:]:
        (tmp_path / "own" / f"x-{row['image']}").write_bytes((images / row["image"]).read_bytes())
    renamed = [{**row, "image": f"x-{row['image']}"} for row in rows[14:]]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    return DataConfig(
        sources=(
            DataSource(records=str(tmp_path / "one.csv"), images=str(images), columns=ColumnNames(question="frage")),
            DataSource(records=str(tmp_path / "two.parquet")),
            DataSource(records=str(tmp_path / "three.jsonl"), images=str(tmp_path / "own")),
        ),
        holdout=2,
        workers=0,
    )


@pytest.mark.slow
def test_a_run_on_a_mixture_has_the_steps_of_the_run_on_one_file(
    mixed: DataConfig, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    one = _one_stage(tiny_recipe, tiny_recipe.stages[0].data, tmp_path / "whole", max_steps=2)
    two = _one_stage(tiny_recipe, mixed, tmp_path / "mixed", max_steps=2)
    weights = [load_file(next(_train(recipe).glob("*.safetensors"))) for recipe in (one, two)]
    assert _figures(one) == _figures(two)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    probes = [
        [
            json.loads(line)["samples"]
            for line in (Path(recipe.output_dir) / "stage1/probe.jsonl").read_text().splitlines()
        ]
        for recipe in (one, two)
    ]
    assert probes[0] == probes[1]


@pytest.mark.slow
def test_a_weighted_run_resumes_bit_for_bit(mixed: DataConfig, tiny_recipe: Recipe, tmp_path: Path) -> None:
    weights = (0.5, 1.5, 1.0)
    data = dataclasses.replace(
        mixed,
        sources=tuple(
            dataclasses.replace(source, weight=weight) for source, weight in zip(mixed.sources, weights, strict=True)
        ),
    )
    whole = _one_stage(tiny_recipe, data, tmp_path / "whole", epochs=1.5)
    halved = dataclasses.replace(whole, output_dir=str(tmp_path / "halved"))
    expected = _train(whole)
    steps = len(_figures(whole))
    lengths = measure_records(whole.stages[0], build_model(whole.model)[0].config)
    assert steps == count_steps(whole.stages[0], lengths)
    with pytest.raises(InterruptedRunError):
        _train(halved, (_SignalAt(steps - 3),))
    ours = _train(halved)
    assert _figures(halved) == _figures(whole)
    pair = [load_file(next(folder.glob("*.safetensors"))) for folder in (ours, expected)]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[1])


@pytest.mark.slow
def test_a_dry_run_takes_the_longest_records_of_all_sources(
    mixed: DataConfig, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _one_stage(tiny_recipe, mixed, tmp_path / "run")
    (tmp_path / "mine.yaml").write_text(dump_recipe(recipe))
    assert cli.main(["train", str(tmp_path / "mine.yaml"), "--dry-run"]) == 0
    assert "stage1" in capsys.readouterr().out
    assert not list(tmp_path.glob(".run*"))


def test_each_source_is_checked_with_its_own_folder(mixed: DataConfig, tiny_recipe: Recipe, tmp_path: Path) -> None:
    processor = build_model(tiny_recipe.model)[1]
    stage = _one_stage(tiny_recipe, mixed, tmp_path / "run").stages[0]
    kept, held = stage_records(stage, processor, seed=0)
    assert sorted([*kept.indices.tolist(), *held.indices.tolist()]) == list(range(18))
    assert [kept.roots_of(index).roots[-1:] for index in (0, 17)] == [
        (Path(str(mixed.sources[0].images)),),
        (tmp_path / "own",),
    ]
    swapped = dataclasses.replace(mixed.sources[2], images=mixed.sources[0].images)
    data = dataclasses.replace(mixed, sources=(*mixed.sources[:2], swapped))
    with pytest.raises(LlavarError, match=r"(?s)4 of 18 records cannot be trained on.*three\.jsonl:0: .*is in none"):
        stage_records(dataclasses.replace(stage, data=data), processor, seed=0)
    none = dataclasses.replace(mixed.sources[2], images=())
    data = dataclasses.replace(mixed, sources=(*mixed.sources[:2], none))
    with pytest.raises(LlavarError, match=r"data\.sources\.2\.images: not set, and 4 of 4 records name an image"):
        stage_records(dataclasses.replace(stage, data=data), processor, seed=0)
    shared = dataclasses.replace(data, images=str(tmp_path / "own"))
    stage_records(dataclasses.replace(stage, data=shared), processor, seed=0)


def test_a_changed_source_is_found_when_a_run_is_resumed(
    mixed: DataConfig, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = build_model(tiny_recipe.model)[1]
    rows, images = _rows(tiny_recipe)
    features = datasets.Features(
        {"id": datasets.Value("string"), "conversations": TURNS_TYPE, "image": datasets.Image()}
    )
    listed = [{**row, "image": {"bytes": (images / row["image"]).read_bytes(), "path": None}} for row in rows[:2]]
    cached = datasets.Dataset.from_list([{key: row[key] for key in features} for row in listed], features=features)
    cached.save_to_disk(tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.load_from_disk(str(tmp_path / "cache")))
    hub = DataSource(records="hf://org/name/x?split=test", columns=ColumnNames(id="id"))
    data = dataclasses.replace(mixed, sources=(mixed.sources[2], hub))
    stage = _one_stage(tiny_recipe, data, tmp_path / "run").stages[0]

    def inputs() -> dict[str, str]:
        return dict(hash_inputs(record_files(stage, stage_records(stage, processor, seed=0)[0]), ranks=1).records)

    before = inputs()
    assert [Path(name).suffix for name in before] == [".jsonl", ".arrow"]
    assert inputs() == before
    path = tmp_path / "three.jsonl"
    path.write_text(path.read_text() + "\n")
    after = inputs()
    assert [before[name] == after[name] for name in before] == [False, True]


def test_the_estimate_counts_weights_and_embedded_images(
    mixed: DataConfig, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    config = build_model(tiny_recipe.model)[0].config
    plain = measure_records(_one_stage(tiny_recipe, tiny_recipe.stages[0].data, tmp_path).stages[0], config)
    ours = measure_records(_one_stage(tiny_recipe, mixed, tmp_path).stages[0], config)
    assert ours.records == plain.records == 18
    assert ours.images == plain.images == 1
    assert abs(ours.mean - plain.mean) <= 2
    assert ours.counts == (8, 6, 4)
    hub = dataclasses.replace(mixed, sources=(DataSource(records="hub:org/name"),))
    assert measure_records(_one_stage(tiny_recipe, hub, tmp_path).stages[0], config).records is None
