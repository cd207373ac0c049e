"""``Trainer``: runs the stages of a recipe in order, and resumes an interrupted run."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import transformers

from llavar_peft.atomic_files import check_output_folder, commit_folder, disk_errors
from llavar_peft.constants import METRICS_FILE, PROBE_FILE
from llavar_peft.data.training_dataset import TrainingDataset
from llavar_peft.errors import ConfigError, InterruptedRunError, LlavarError
from llavar_peft.models.merge_adapter import merge_adapter
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import disable_packing, enable_packing, replace_flash_attention
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.models.quantized_checkpoint import prepare_recipe
from llavar_peft.models.rank_agreement import on_any_rank
from llavar_peft.models.tuning import (
    apply_tuning,
    is_quantized,
    merge_tuning,
    share_adapter_inputs,
    trained_parameters,
)
from llavar_peft.page.run_page import has_run_page, write_run_page
from llavar_peft.recipe.schema import Lora, ModelConfig, Recipe, Stage
from llavar_peft.recipe.schema_rules import trains_image_rows
from llavar_peft.training import run_files
from llavar_peft.training.checkpoint_folders import RunInputs, checkpoint_step, find_resume_point, hash_inputs
from llavar_peft.training.checkpoint_writer import explain_full_disk
from llavar_peft.training.dropped_records import DROPPED_FILE, DroppedRecords
from llavar_peft.training.holdout_probe import Probe
from llavar_peft.training.launch import start_processes
from llavar_peft.training.out_of_memory import explain_out_of_memory
from llavar_peft.training.read_shards import build_for_training
from llavar_peft.training.run_folder import RunFolder, keep_holdout, lock_folder
from llavar_peft.training.save_weights import save_plain, save_result
from llavar_peft.training.sharding import reset_zero
from llavar_peft.training.stage_arguments import check_trackers, micro_batches, resolve_precision, training_arguments
from llavar_peft.training.stage_records import check_data_paths, record_files, stage_records
from llavar_peft.training.stage_trainer import StageTrainer
from llavar_peft.training.trainer_callbacks import EvalCallback, ProgressBar, SaveByTime, StopOnSignal
from llavar_peft.weights.io.tensor_blocks import write_checksums

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model by a recipe.

    Each stage runs on ``transformers.Trainer``. Under ``accelerate launch`` every process creates its own ``Trainer``.

    Args:
        model: The model from ``build_model``; it is trained in place.
        processor: The processor from ``build_model``.
        recipe: The run. It is validated again, because Python does not check types.
        callbacks: Additional callbacks for the ``transformers.Trainer`` of every stage.

    Raises:
        ConfigError: The recipe is not valid.
    """

    def __init__(
        self,
        model: LlavarForConditionalGeneration,
        processor: LlavarProcessor,
        recipe: Recipe,
        *,
        callbacks: Sequence[transformers.TrainerCallback] = (),
    ) -> None:
        self.recipe = prepare_recipe(recipe)
        check_trackers(self.recipe)
        _check_model(model, self.recipe)
        self.model: Any = model
        self.processor = processor
        self.callbacks = list(callbacks)
        self.run = RunFolder(self.recipe)
        self.base = self.recipe.model  # the model that the next stage starts from
        self.processes = start_processes(self.recipe)
        self.ranks = self.processes.num_processes
        self.main = self.processes.is_main_process

    def __repr__(self) -> str:
        stages = ", ".join(stage.name for stage in self.recipe.stages)
        return f"Trainer(stages: {stages}; output_dir={self.recipe.output_dir!r})"

    def train(self, stages: Sequence[str] | None = None, *, restart: bool = False, allow_changes: bool = False) -> Path:
        """Run the recipe or some of its stages. Finished stages are loaded, not run again.

        Args:
            stages: Names of the stages to run; None means all.
            restart: Whether to delete existing results of these stages and start again.
            allow_changes: Whether to resume although the recipe, the records or the number of processes changed.

        Returns:
            The folder of the last stage's result: a model or an adapter.

        Raises:
            ConfigError: A stage is unknown, or needs one that has not run; or the folder belongs to another recipe or
                to other records.
            EnvironmentFaultError: Another run is active in the folder; the disk is full; there is not enough memory; a
                loss or gradient is not finite.
            DataError: More records or images are unusable than the recipe allows.
            InterruptedRunError: A signal stopped the run after it was saved.
        """
        if not restart:
            self.recipe = keep_holdout(self.recipe)
            self.run = RunFolder(self.recipe)
        selected = self.run.select_stages((stages,) if isinstance(stages, str) else stages)
        with lock_folder(self.run.root) if self.main else nullcontext():
            if self.main:
                self.run.open(restart=restart, stages=selected, allow_changes=allow_changes)
            self.processes.wait_for_everyone()
            return self._run_stages(selected, allow_changes=allow_changes)

    def _run_stages(self, selected: Sequence[Stage], *, allow_changes: bool) -> Path:
        """Run the selected stages in order, and return the folder of the last result."""
        # Check the batches and data of all stages before the first step of the first one.
        for stage in selected:
            micro_batches(stage, ranks=self.ranks)
        data = {stage.name: stage_records(stage, self.processor, seed=self.recipe.seed) for stage in selected}
        result = Path(self.recipe.output_dir)
        for stage in self.recipe.stages:
            if self.run.finished(stage):
                logger.info("%s: finished before, its result is loaded", stage.name)
                result = self._load_finished(stage)
                if self.main:
                    self.run.remove_checkpoints(stage)
                if not has_run_page(self.run.root):
                    self._write_page()
            elif stage in selected:
                with explain_out_of_memory(stage, self.recipe.model, ranks=self.ranks):
                    result = self._run_stage(stage, *data[stage.name], allow_changes=allow_changes)
            else:
                self.run.check_not_needed(stage, selected)
        return result

    def _load_finished(self, stage: Stage) -> Path:
        """Load the result of a stage that finished before, so that the next one starts from it. Return its folder."""
        result = self.run.result(stage)
        self.base = self._base_after(stage, result)
        if self.model.pending_weights is None:
            self.run.load_result(stage, self.model)
        else:
            self.model = self._build_next()
        return result

    def _build_next(self) -> LlavarForConditionalGeneration:
        """Build the model that the next stage starts from, with its weights pending if they will be sharded."""
        base = dataclasses.replace(self.base, quantize=self.recipe.model.quantize)
        return build_for_training(base, self.processes, seed=self.recipe.seed)[0]

    def _run_stage(
        self, stage: Stage, train_set: TrainingDataset, held_out: TrainingDataset, *, allow_changes: bool
    ) -> Path:
        """Train a stage, from its newest checkpoint if there is one, and return the folder of its result."""
        directory = self.run.directory(stage)
        processor: Any = train_set.processor
        transformers.set_seed(self.recipe.seed)
        inputs = hash_inputs(record_files(stage, train_set), ranks=self.ranks)
        checkpoint = self._find_checkpoint(stage, inputs, allow_changes=allow_changes)
        tuned_model, packed = self._tune_model(stage, checkpoint)
        arguments = training_arguments(self.recipe, stage, directory, ranks=self.ranks)
        _log_start(stage, tuned_model, records=len(train_set), held_out=len(held_out))
        number = self.recipe.stages.index(stage) + 1
        bar = ProgressBar(f"stage {number}/{len(self.recipe.stages)} {stage.name}")
        stop = StopOnSignal()
        save_by_time = [SaveByTime()] if stage.save_every_steps is None else []
        probe = Probe(stage.probe, held_out, processor, directory, batch_size=stage.micro_batch_size, writes=self.main)

        def log_figures(figures: dict[str, Any]) -> None:
            run_files.append_line(directory / METRICS_FILE, figures)
            bar.show(figures)

        stage_trainer = StageTrainer(
            tuned_model,
            processor,
            stage,
            arguments,
            packed=packed,
            dataset=train_set,
            dropped=DroppedRecords(self._dropped_file(directory), stage.data, total=len(train_set), ranks=self.ranks),
            inputs=inputs,
            base=self.base,
            recipe=self.recipe,
            sink=log_figures,
            callbacks=[bar, stop, *save_by_time, *([EvalCallback(probe)] if len(held_out) else []), *self.callbacks],
        )
        try:
            self._take_steps(stage_trainer, tuned_model, checkpoint, bar, stop)
            # Until the result is on the disk, a signal still waits: there may be no checkpoint of the last steps.
            result = self._finish_stage(stage, stage_trainer)
        finally:
            stop.restore()
        if on_any_rank(stop.requested) and stage != self.recipe.stages[-1]:
            raise InterruptedRunError.at(
                stage.name,
                "interrupted; this stage is finished",
                "run the same command again to continue with the next",
            )
        return result

    def _find_checkpoint(self, stage: Stage, inputs: RunInputs, *, allow_changes: bool) -> Path | None:
        """Return the checkpoint that a stage resumes from, and drop the log lines of the steps after it."""
        directory = self.run.directory(stage)
        checkpoint = find_resume_point(directory, inputs, self.processes, allow_changes=allow_changes)
        if self.main:
            # Without a checkpoint, the probe of step 0 is repeated as well.
            step = checkpoint_step(checkpoint) if checkpoint else -1
            for name in (METRICS_FILE, PROBE_FILE):
                run_files.drop_lines_after(directory / name, step)
        if checkpoint:
            logger.info("%s: resumes from step %d", stage.name, checkpoint_step(checkpoint))
        return checkpoint

    def _tune_model(self, stage: Stage, checkpoint: Path | None) -> tuple[Any, bool]:
        """Make the model trainable as the stage requires. Return it, and whether its rows can be packed.

        Call this before ``training_arguments``: once ZeRO-3's settings are known, peft takes the model for partitioned,
        and transformers partitions every model that is built, also the one without memory that is asked about packing.
        """
        tuned_model = apply_tuning(
            self.model, stage.tune, new_rows=trains_image_rows(self.recipe, stage), checkpoint=checkpoint
        )
        if resolve_precision(stage.precision) == "fp32" and replace_flash_attention(self.model):
            logger.info("%s: computes in float32, so SDPA replaces flash-attention", stage.name)
        return tuned_model, stage.packing and enable_packing(tuned_model)

    def _take_steps(
        self,
        stage_trainer: StageTrainer,
        tuned_model: Any,
        checkpoint: Path | None,
        bar: ProgressBar,
        stop: StopOnSignal,
    ) -> None:
        """Take a stage's optimizer steps. Raise ``InterruptedRunError`` if a signal stops them before the last one."""
        try:
            with share_adapter_inputs(tuned_model, autocast=stage_trainer.accelerator.native_amp):
                stage_trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            disable_packing(self.model)
            reset_zero()
            bar.close()
        state = stage_trainer.state
        if stop.requested and state.global_step < state.max_steps:
            self._write_page()
            raise InterruptedRunError.at(
                f"{stage_trainer.stage.name}:step {state.global_step} of {state.max_steps}",
                "interrupted; everything up to this step is saved",
                "run the same command again to resume",
            )

    def _finish_stage(self, stage: Stage, stage_trainer: StageTrainer) -> Path:
        """Write the stage's result, and make the model ready for the next stage."""
        final = self.run.result(stage)
        staged = final.with_name(f".{final.name}.part")
        if self.main:
            shutil.rmtree(staged, ignore_errors=True)
        stage_trainer.accelerator.wait_for_everyone()
        with explain_full_disk(final, staged):
            stage_trainer.save_model(str(staged))
        stage_trainer.accelerator.wait_for_everyone()
        is_lora, is_last = isinstance(stage.tune, Lora), stage == self.recipe.stages[-1]
        quantized, sharded = is_quantized(self.model), stage_trainer.sharding is not None
        if not sharded:
            tuned_model = stage_trainer.accelerator.unwrap_model(stage_trainer.model)
            # An adapter is merged, because the next stage needs a plain model; that of the last stage is kept.
            self.model = tuned_model if is_lora and is_last else merge_tuning(tuned_model)
        if self.main:
            with explain_full_disk(final, staged):
                if not is_lora:
                    if quantized:
                        save_result(self.recipe.model, staged)
                    write_checksums(staged)
                commit_folder(staged, final)
            if is_lora and not is_last:
                self._save_merged(stage, from_disk=sharded)
            self.run.mark_finished(stage, steps=stage_trainer.state.global_step)
            self.run.remove_checkpoints(stage)
            self._write_page()
        stage_trainer.accelerator.wait_for_everyone()
        stage_trainer.accelerator.free_memory()
        self.base = self._base_after(stage, final)
        if sharded and not is_last:
            # A sharded model stays sharded; the next stage needs a whole one.
            self.model = self._build_next()
        return final

    def _save_merged(self, stage: Stage, *, from_disk: bool) -> None:
        """Save the model with a stage's adapter merged into it, which the next stage starts from."""
        final = self.run.merged(stage)
        staged = final.with_name(f".{final.name}.part")
        shutil.rmtree(staged, ignore_errors=True)
        with explain_full_disk(final, staged):
            if from_disk:
                base = self.base.checkpoint or str(self.base.language_model)
                merge_adapter(base, self.run.result(stage), staged, probe=False)
            else:
                save_plain(self.model, self.processor, staged)
            write_checksums(staged)
            commit_folder(staged, final)

    def _base_after(self, stage: Stage, result: Path) -> ModelConfig:
        """Return the model that an adapter of the next stage belongs to."""
        if isinstance(stage.tune, Lora):
            if stage == self.recipe.stages[-1]:
                return self.base
            result = self.run.merged(stage)
        return dataclasses.replace(
            self.base, checkpoint=str(result.resolve()), language_model=None, vision_tower=None, projector=None
        )

    def _dropped_file(self, directory: Path) -> Path:
        rank = self.processes.process_index
        return directory / (DROPPED_FILE if rank == 0 else DROPPED_FILE.replace(".", f".rank{rank}."))

    def _write_page(self) -> None:
        if self.main:
            try:
                write_run_page(Path(self.recipe.output_dir))
            except LlavarError as error:
                # The page can be written again at any time; the training must not fail because of it.
                logger.warning("the run's page was not written: %s", error)


def _check_model(model: object, recipe: Recipe) -> None:
    """Reject a model that the recipe does not describe: its results would be recorded for another one."""
    fix = "pass the model from build_model(recipe.model)"
    if not isinstance(model, LlavarForConditionalGeneration) or hasattr(model, "peft_config"):
        got = "one with adapters" if hasattr(model, "peft_config") else type(model).__name__
        raise ConfigError.at("model", f"expected a LLaVAR without adapters (got {got})", fix)
    if is_quantized(model) != (recipe.model.quantize is not None):
        got, expected = "quantized" if is_quantized(model) else "not quantized", recipe.model.quantize
        raise ConfigError.at("model", f"is {got}, and the recipe's model.quantize is {expected}", fix)


def _log_start(stage: Stage, tuned_model: Any, *, records: int, held_out: int) -> None:
    count, total = trained_parameters(tuned_model)
    logger.info(
        "%s: %d records, %d held out; trains %s of %s parameters in %s",
        stage.name, records, held_out, f"{count:,}", f"{total:,}", resolve_precision(stage.precision),
    )  # fmt: skip


def run_recipe(
    recipe: Recipe, stages: Sequence[str] | None = None, *, restart: bool = False, allow_changes: bool = False
) -> Path:
    """Build the recipe's model, train it as ``Trainer.train`` does, and return the folder of the last result."""
    recipe = prepare_recipe(recipe)
    check_trackers(recipe)
    check_output_folder(Path(recipe.output_dir), "output_dir")
    check_data_paths([stage for stage in recipe.stages if not stages or stage.name in stages])
    with disk_errors(Path(recipe.output_dir), only_full=True):
        processes = start_processes(recipe)
        model, processor = build_for_training(recipe.model, processes, seed=recipe.seed)
        return Trainer(model, processor, recipe).train(stages, restart=restart, allow_changes=allow_changes)
