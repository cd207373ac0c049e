"""``Trainer``: runs a recipe's stages one after the other, and goes on where an earlier run stopped."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState

from llavar_peft.atomic_files import commit_folder
from llavar_peft.constants import METRICS_FILE, PROBE_FILE
from llavar_peft.data.training_dataset import TrainingDataset
from llavar_peft.errors import ConfigError, InterruptedRunError, LlavarError
from llavar_peft.models.build_model import build_model
from llavar_peft.models.merge_adapter import merge_adapter
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import disable_packing
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.models.tuning import apply_tuning, is_quantized, merge_tuning, trained_parameters
from llavar_peft.page.run_page import has_run_page, write_run_page
from llavar_peft.recipe.schema import Lora, ModelConfig, Recipe, Stage
from llavar_peft.recipe.schema_rules import trains_image_rows
from llavar_peft.recipe.validate import validate_recipe
from llavar_peft.training import run_files
from llavar_peft.training.checkpoint_folders import (
    Origin,
    check_same_run,
    checkpoints,
    discard_unfinished,
    newest_good,
    origin_of,
    step_of,
)
from llavar_peft.training.checkpoint_writer import named_if_full
from llavar_peft.training.deepspeed_zero import reset_zero
from llavar_peft.training.dropped_records import DROPPED_FILE, DroppedRecords
from llavar_peft.training.holdout_probe import Probe
from llavar_peft.training.out_of_memory import explain_out_of_memory
from llavar_peft.training.run_folder import RunFolder
from llavar_peft.training.run_lock import locked
from llavar_peft.training.save_weights import save_plain, save_result
from llavar_peft.training.stage_arguments import micro_batches, resolve_precision, training_arguments
from llavar_peft.training.stage_records import stage_records
from llavar_peft.training.stage_trainer import StageTrainer
from llavar_peft.training.trainer_callbacks import EvalCallback, ProgressBar, StopOnSignal
from llavar_peft.weights.io.tensor_blocks import write_checksums

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model by a recipe.

    Each stage runs on ``transformers.Trainer``; under ``accelerate launch`` every process makes its own ``Trainer``.

    Args:
        model: From ``build_model``; it is trained in place.
        processor: From ``build_model``.
        recipe: The run. It is validated here once more, since Python does not check types.
        callbacks: Further callbacks for every stage's ``transformers.Trainer``.

    Raises:
        ConfigError: The recipe is not sound.
    """

    def __init__(
        self,
        model: LlavarForConditionalGeneration,
        processor: LlavarProcessor,
        recipe: Recipe,
        *,
        callbacks: Sequence[transformers.TrainerCallback] = (),
    ) -> None:
        self.recipe = validate_recipe(recipe)
        self.model: Any = model
        self.processor = processor
        self.callbacks = list(callbacks)
        self.run = RunFolder(self.recipe)
        self.base = self.recipe.model
        # Without a GPU the state has to be told so, or it takes several processes for one.
        self.processes = PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()))
        self.ranks = self.processes.num_processes
        self.main = self.processes.is_main_process

    def train(self, stages: Sequence[str] | None = None, *, restart: bool = False, allow_changes: bool = False) -> Path:
        """Run the recipe, or some of its stages; what is finished already is taken up, not run again.

        Args:
            stages: Names of the stages to run; None is all of them.
            restart: Whether to throw away what earlier runs left for these stages.
            allow_changes: Whether to go on although recipe, records or number of processes changed.

        Returns:
            The folder of the last stage's result: a model, or an adapter.

        Raises:
            ConfigError: A stage is unknown, or builds on one that has not run; or the folder belongs to another recipe,
                or to other records.
            EnvironmentFaultError: Another run is at work in the folder; the disk is full; the memory did not suffice; a
                loss or gradient is not finite.
            DataError: Records or images that cannot be trained on, beyond what the recipe allows.
            InterruptedRunError: Stopped by a signal, after saving.
        """
        expected = self._expected(stages)
        with locked(self.run.root) if self.main else nullcontext():
            if self.main:
                self.run.open(restart=restart, stages=expected, allow_changes=allow_changes)
            self.processes.wait_for_everyone()
            return self._run_stages(expected, allow_changes=allow_changes)

    def _run_stages(self, expected: Sequence[Stage], *, allow_changes: bool) -> Path:
        # Everything that can be wrong with batches and data is found before the first step of the first stage.
        for stage in expected:
            micro_batches(stage, ranks=self.ranks)
        data = {stage.name: stage_records(stage, self.processor, seed=self.recipe.seed) for stage in expected}
        result = Path(self.recipe.output_dir)
        for stage in self.recipe.stages:
            if self.run.finished(stage):
                logger.info("%s: finished before, its result is taken up", stage.name)
                result = self.run.take_up(stage, self.model)
                self.base = self._based_on(stage, result)
                self._discard_checkpoints(stage)
                if not has_run_page(self.run.root):
                    self._write_page()
            elif stage in expected:
                train_set, held_out = data[stage.name]
                with explain_out_of_memory(stage, self.recipe.model, ranks=self.ranks):
                    result = self._run_stage(stage, train_set, held_out, allow_changes=allow_changes)
            else:
                self._check_needed(stage, expected)
        return result

    def _expected(self, names: Sequence[str] | None) -> tuple[Stage, ...]:
        known = {stage.name: stage for stage in self.recipe.stages}
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise ConfigError.at(
                "stages", f"no stage of that name (got {', '.join(unknown)})", f"use one of {', '.join(known)}"
            )
        return tuple(stage for stage in self.recipe.stages if names is None or stage.name in names)

    def _check_needed(self, stage: Stage, expected: Sequence[Stage]) -> None:
        order = [known.name for known in self.recipe.stages]
        later = [other.name for other in expected if order.index(other.name) > order.index(stage.name)]
        given = self.recipe.model.projector is not None or self.recipe.model.checkpoint is not None
        if later and not given:
            raise ConfigError.at(
                f"stages.{later[0]}",
                f"builds on stage {stage.name!r}, which has not run in {self.recipe.output_dir}",
                f"run {stage.name!r} first, or give its result as model.projector",
            )

    def _run_stage(
        self, stage: Stage, train_set: TrainingDataset, held_out: TrainingDataset, *, allow_changes: bool
    ) -> Path:
        directory = self.run.directory(stage)
        processor: Any = train_set.processor
        transformers.set_seed(self.recipe.seed)
        records = stage.data.records
        origin = origin_of((records,) if isinstance(records, str) else records, ranks=self.ranks)
        resume = self._resume_point(directory, origin, allow_changes=allow_changes)
        trained = apply_tuning(
            self.model, stage.tune, new_rows=trains_image_rows(self.recipe, stage), checkpoint=resume
        )
        # After the model: with ZeRO-3's settings around, peft takes it for partitioned.
        arguments = training_arguments(self.recipe, stage, directory, ranks=self.ranks)
        count, whole = trained_parameters(trained)
        logger.info(
            "%s: %d records, %d held out; trains %s of %s parameters in %s",
            stage.name, len(train_set), len(held_out), f"{count:,}", f"{whole:,}", resolve_precision(stage.precision),
        )  # fmt: skip
        number = self.recipe.stages.index(stage) + 1
        bar = ProgressBar(f"stage {number}/{len(self.recipe.stages)} {stage.name}")
        stop = StopOnSignal()
        probe = Probe(stage.probe, held_out, processor, directory, batch_size=stage.micro_batch_size, writes=self.main)

        def sink(figures: dict[str, Any]) -> None:
            run_files.append_line(directory / METRICS_FILE, figures)
            bar.show(figures)

        engine = StageTrainer(
            trained,
            processor,
            stage,
            arguments,
            dataset=train_set,
            ledger=DroppedRecords(self._dropped(directory), stage.data, total=len(train_set), ranks=self.ranks),
            origin=origin,
            base=self.base,
            recipe=self.recipe,
            sink=sink,
            callbacks=[bar, stop, *([EvalCallback(probe)] if len(held_out) else []), *self.callbacks],
        )
        try:
            engine.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            disable_packing(self.model)
            reset_zero()
            stop.restore()
            if bar.bar is not None:
                bar.bar.close()
        if stop.requested and engine.state.global_step < engine.state.max_steps:
            self._write_page()
            raise InterruptedRunError.at(
                f"{stage.name}:step {engine.state.global_step} of {engine.state.max_steps}",
                "interrupted; everything up to this step is saved",
                "run the same command again to go on",
            )
        return self._finish_stage(stage, engine)

    def _finish_stage(self, stage: Stage, engine: StageTrainer) -> Path:
        final = self.run.result(stage)
        staged = final.with_name(f".{final.name}.part")
        if self.main:
            shutil.rmtree(staged, ignore_errors=True)
        engine.accelerator.wait_for_everyone()
        with named_if_full(final, staged):
            engine.save_model(str(staged))
        engine.accelerator.wait_for_everyone()
        # The last stage's adapters stay adapters; another stage builds on the plain model.
        keep = isinstance(stage.tune, Lora) and stage == self.recipe.stages[-1]
        quantized = is_quantized(self.model)
        if not engine.sharded:
            trained = engine.accelerator.unwrap_model(engine.model)
            self.model = trained if keep else merge_tuning(trained)
        if self.main:
            if not isinstance(stage.tune, Lora):
                if quantized:
                    save_result(self.recipe.model, staged)
                write_checksums(staged)
            commit_folder(staged, final)
            if isinstance(stage.tune, Lora) and not keep:
                self._save_merged(stage, from_disk=engine.sharded)
            self.run.mark_finished(stage, steps=engine.state.global_step)
            self._discard_checkpoints(stage)
            self._write_page()
        engine.accelerator.wait_for_everyone()
        engine.accelerator.free_memory()
        self.base = self._based_on(stage, final)
        if engine.sharded and stage != self.recipe.stages[-1]:
            # What is sharded stays so; the next stage wants a whole model.
            self.model = build_model(dataclasses.replace(self.base, quantize=self.recipe.model.quantize))[0]
        return final

    def _save_merged(self, stage: Stage, *, from_disk: bool) -> None:
        final = self.run.merged(stage)
        staged = final.with_name(f".{final.name}.part")
        shutil.rmtree(staged, ignore_errors=True)
        with named_if_full(final, staged):
            if from_disk:
                base = self.base.checkpoint or str(self.base.language_model)
                merge_adapter(base, self.run.result(stage), staged, probe=False)
            else:
                save_plain(self.model, self.processor, staged)
        write_checksums(staged)
        commit_folder(staged, final)

    def _based_on(self, stage: Stage, result: Path) -> ModelConfig:
        """What an adapter of the next stage is an adapter of."""
        if isinstance(stage.tune, Lora):
            if stage == self.recipe.stages[-1]:
                return self.base
            result = self.run.merged(stage)
        return dataclasses.replace(
            self.base, checkpoint=str(result.resolve()), language_model=None, vision_tower=None, projector=None
        )

    def _resume_point(self, directory: Path, origin: Origin, *, allow_changes: bool) -> Path | None:
        if self.main:
            discard_unfinished(directory)
            newest_good(directory)
        self.processes.wait_for_everyone()
        # What is broken has another name by now.
        found = checkpoints(directory)[-1:]
        if found and not allow_changes:
            check_same_run(found[0], origin)
        step = step_of(found[0]) if found else 0
        if self.main:
            # A run that starts at its beginning takes its first look again.
            for name in (METRICS_FILE, PROBE_FILE):
                run_files.drop_lines_after(directory / name, step if found else -1)
        if found:
            logger.info("%s: goes on from step %d", directory.name, step)
        return found[0] if found else None

    def _discard_checkpoints(self, stage: Stage) -> None:
        if self.main:
            directory = self.run.directory(stage)
            discard_unfinished(directory)
            for checkpoint in checkpoints(directory):
                shutil.rmtree(checkpoint)

    def _dropped(self, directory: Path) -> Path:
        rank = self.processes.process_index
        return directory / (DROPPED_FILE if rank == 0 else DROPPED_FILE.replace(".", f".rank{rank}."))

    def _write_page(self) -> None:
        if self.main:
            try:
                write_run_page(Path(self.recipe.output_dir))
            except LlavarError as error:
                # A page can be made again at any time; a training cannot.
                logger.warning("the run's page was not written: %s", error)


def run_recipe(
    recipe: Recipe, stages: Sequence[str] | None = None, *, restart: bool = False, allow_changes: bool = False
) -> Path:
    """Build the recipe's model and trains it: what ``llavar-peft train`` calls.

    Args:
        recipe: The run.
        stages: Names of the stages to run; None is all of them.
        restart: Whether to throw away what earlier runs left.
        allow_changes: Whether to go on although recipe, records or number of processes changed.

    Returns:
        The folder of the last stage's result.
    """
    model, processor = build_model(recipe.model, seed=recipe.seed)
    return Trainer(model, processor, recipe).train(stages, restart=restart, allow_changes=allow_changes)
