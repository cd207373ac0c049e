"""The dry run of a recipe: each stage trains two steps on its longest records, with a checkpoint and a resume between.

The model is built for each stage from the recipe's start, so that a later stage can be tested without the results of
earlier ones. Everything is written to a hidden folder next to the run's, which is removed at the end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState

from llavar_peft.atomic_files import check_output_folder, disk_errors, write_bytes, write_json
from llavar_peft.constants import METRICS_FILE
from llavar_peft.data.message_records import as_record
from llavar_peft.data.record_store import parse_record
from llavar_peft.data.training_dataset import TrainingDataset
from llavar_peft.errors import InterruptedRunError
from llavar_peft.models.quantized_checkpoint import prepare_recipe
from llavar_peft.recipe.data_sources import paths_of, sources_of
from llavar_peft.recipe.schema import DataConfig, Recipe, Stage
from llavar_peft.training.checkpoint_folders import list_checkpoints
from llavar_peft.training.launch import start_processes
from llavar_peft.training.read_shards import build_for_training
from llavar_peft.training.stage_records import check_data_paths, stage_records
from llavar_peft.training.trainer import Trainer
from llavar_peft.training.trainer_callbacks import SAVE_SECONDS
from llavar_peft.types import EmbeddedImage

_SAMPLE = 1000
"""Number of records from whose lengths the duration of the whole stage is estimated."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The measurements of a stage's two steps.

    Attributes:
        stage: The stage's name.
        longest: Approximate number of tokens of the longest record.
        tokens: Tokens of the larger step, over all ranks.
        peak_bytes: Peak memory of this rank's GPU or, without a GPU, process.
        seconds: Duration of the second step.
        steps: Number of steps of the whole stage.
        projected: Estimated duration of the whole stage in seconds, from its number of tokens.
        save_every: Number of steps between two checkpoints.
        checkpoint_bytes: Size of one checkpoint on disk.
        result_bytes: Size of the stage's result on disk.
    """

    stage: str
    longest: int
    tokens: int
    peak_bytes: int
    seconds: float
    steps: int
    projected: float
    save_every: int
    checkpoint_bytes: int
    result_bytes: int


def dry_run(recipe: Recipe, stages: tuple[str, ...] = ()) -> Iterator[Trial]:
    """Try a recipe's stages, one after the other.

    Args:
        recipe: The run; under ``accelerate launch`` every rank takes part.
        stages: Names of the stages to try; empty tries all.

    Raises:
        LlavarError: Any error that would stop the run.
    """
    check_data_paths([stage for stage in recipe.stages if not stages or stage.name in stages])
    recipe = prepare_recipe(recipe)
    processes = start_processes(recipe)
    output = Path(recipe.output_dir)
    folder = output.with_name(f".{output.name}.dry-run")
    if processes.is_main_process:
        check_output_folder(output, "output_dir")
        shutil.rmtree(folder, ignore_errors=True)
        with disk_errors(folder):
            folder.mkdir(parents=True)
    processes.wait_for_everyone()
    try:
        for stage in recipe.stages:
            if not stages or stage.name in stages:
                yield _try_stage(recipe, stage, folder / stage.name, processes)
    finally:
        processes.wait_for_everyone()
        if processes.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


class _StopOnce(transformers.TrainerCallback):
    """Stop the first attempt after its first step has been saved; the second attempt has to resume there."""

    def __init__(self) -> None:
        self.checkpoint_bytes = 0
        self.seconds = 0.0
        self._began = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._began

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()
        if state.global_step == 1 and not self.checkpoint_bytes:
            self.checkpoint_bytes = _size(list_checkpoints(Path(args.output_dir))[-1])
            raise InterruptedRunError.at("dry run", "stopped after the first step", "no action is needed")


def _try_stage(recipe: Recipe, stage: Stage, folder: Path, processes: PartialState) -> Trial:
    """Train a stage's first step, save, build the model again, and resume for the second step."""
    model, processor = build_for_training(recipe.model, processes, seed=recipe.seed)
    dataset, _ = stage_records(stage, processor, seed=recipe.seed)
    longest_first = sorted(
        ((dataset.estimated_tokens(position), position) for position in range(len(dataset))), reverse=True
    )
    batch_size = min(stage.global_batch_size, 2 * stage.micro_batch_size * processes.num_processes)
    if processes.is_main_process:
        folder.mkdir(parents=True)
        _write_records(dataset, [position for _, position in longest_first[: 2 * batch_size]], folder)
    processes.wait_for_everyone()
    short_recipe = _shorten(recipe, stage, folder, batch_size)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    stop = _StopOnce()
    try:
        Trainer(model, processor, short_recipe, callbacks=[stop]).train()
    except InterruptedRunError:
        if not stop.checkpoint_bytes:
            raise
    del model
    model, processor = build_for_training(recipe.model, processes, seed=recipe.seed)
    result = Trainer(model, processor, short_recipe, callbacks=[stop]).train()
    processes.wait_for_everyone()
    lines = (folder / "run" / stage.name / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    figures = [json.loads(line) for line in lines]
    draw = dataset.draw(seed=recipe.seed, shuffle=stage.data.shuffle)
    size = len(dataset) if draw is None else len(draw)
    steps = stage.max_steps or math.ceil(math.ceil(size / stage.global_batch_size) * stage.epochs)
    sampled_lengths = [length for length, _ in longest_first[:: max(1, len(dataset) // _SAMPLE)]]
    tokens_of_stage = steps * stage.global_batch_size * sum(sampled_lengths) / len(sampled_lengths)
    projected = tokens_of_stage * stop.seconds / figures[-1]["tokens"]
    return Trial(
        stage=stage.name,
        longest=longest_first[0][0],
        tokens=max(line["tokens"] for line in figures),
        peak_bytes=_peak_memory(),
        seconds=stop.seconds,
        steps=steps,
        projected=projected,
        save_every=stage.save_every_steps or max(1, round(SAVE_SECONDS * steps / projected)),
        checkpoint_bytes=stop.checkpoint_bytes,
        result_bytes=_size(result),
    )


def _write_records(dataset: TrainingDataset, positions: Sequence[int], folder: Path) -> None:
    """Write some records as a file that names its images by absolute paths; embedded images become files."""
    rows = []
    for number, index in enumerate(dataset.indices[list(positions)].tolist()):
        conversation = parse_record(dataset.records[index], dataset.records.where(index))
        paths = []
        for place, image in enumerate(conversation.images):
            if isinstance(image, EmbeddedImage):
                path = folder / "images" / f"{number}-{place}"
                write_bytes(path, bytes(image.data))
            else:
                path = dataset.roots_of(index).resolve(image)
            paths.append(os.path.abspath(path))
        rows.append(as_record(conversation, paths))
    write_json(folder / "records.json", rows)


def _shorten(recipe: Recipe, stage: Stage, folder: Path, batch_size: int) -> Recipe:
    """Return a recipe of two steps of one stage, on the records that ``_write_records`` wrote."""
    images = [path for source in sources_of(stage.data) for path in paths_of(source.images)]
    embedded_images = folder / "images"
    if embedded_images.is_dir():
        images.append(str(embedded_images))
    data = DataConfig(
        records=str(folder / "records.json"),
        images=tuple(dict.fromkeys(images)),
        image_mode=stage.data.image_mode,
        on_bad_image=stage.data.on_bad_image,
        max_bad_share=stage.data.max_bad_share,
        holdout=0,
        shuffle=False,
        workers=stage.data.workers,
    )
    short_stage = dataclasses.replace(
        stage,
        data=data,
        global_batch_size=batch_size,
        epochs=2.0,
        max_steps=2,
        save_every_steps=1,
        keep_checkpoints=1,
        probe=dataclasses.replace(stage.probe, images=0, every_steps=0),
    )
    return dataclasses.replace(recipe, stages=(short_stage,), output_dir=str(folder / "run"), report_to=())


def _peak_memory() -> int:
    """Return the peak memory of this rank's GPU or, without one, of the process, in bytes."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
