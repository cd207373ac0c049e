"""One stage on ``transformers.Trainer``: what the recipe needs beside it, and nothing else.

Added here: logits at supervised positions only, the loss's average as configured, an order of records that depends on
(seed, epoch) alone, parameter groups, and checkpoints that are whole and appear at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers.trainer import SCHEDULER_NAME

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.epoch_sampler import Balance, EpochSampler
from llavar_peft.data.training_dataset import Collator, Item, TrainingDataset
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.models.tuning import is_quantized, part_of
from llavar_peft.recipe.schema import Lora, ModelConfig, Projector, Recipe, Stage
from llavar_peft.training.activation_checkpointing import Recomputation
from llavar_peft.training.checkpoint_folders import Origin
from llavar_peft.training.checkpoint_writer import CheckpointWriter
from llavar_peft.training.deepspeed_zero import configure_zero, masters
from llavar_peft.training.dropped_records import DroppedRecords
from llavar_peft.training.fsdp import (
    check_fsdp_version,
    check_sharding,
    check_sharding_support,
    enable_sharding,
    gathered_state,
    load_states,
    save_states,
)
from llavar_peft.training.model_card import write_card
from llavar_peft.training.nan_guard import check_finite
from llavar_peft.training.save_weights import load_trained, save_whole
from llavar_peft.training.split_micro_batch import SUPERVISED, split_micro_batch
from llavar_peft.training.supervised_loss import supervised_loss

LogSink = Callable[[dict[str, Any]], None]


@dataclass
class Meter:
    """Counts of the optimizer step under way, on this rank."""

    tokens: int = 0
    supervised: int = 0
    losses: list[tuple[Tensor, tuple[str, ...]]] = field(default_factory=list)
    since: float = 0.0


class StageTrainer(transformers.Trainer):
    """Trains one stage.

    Args:
        model: What ``prepare_for`` returned.
        processor: Saved with every checkpoint.
        stage: The recipe's stage.
        arguments: The parent's settings, made from the stage by ``training_arguments``.
        dataset: Records as items.
        ledger: Counts records that cannot be trained on, and stops the run above its share.
        origin: What a run that goes on from a checkpoint has to share.
        base: What the stage starts from, as an adapter has to name it.
        recipe: The run.
        sink: Takes each step's figures.
        callbacks: The parent's callbacks.
    """

    def __init__(  # noqa: PLR0913 - all by name, from one place
        self,
        model: nn.Module,
        processor: LlavarProcessor,
        stage: Stage,
        arguments: transformers.TrainingArguments,
        *,
        dataset: TrainingDataset,
        ledger: DroppedRecords,
        origin: Origin,
        base: ModelConfig,
        recipe: Recipe,
        sink: LogSink,
        callbacks: list[transformers.TrainerCallback],
    ) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        self.packed = stage.packing and enable_packing(model)
        self.stage = stage
        self.ledger = ledger
        self.base = base
        self.recipe = recipe
        self.sink = sink
        self.meter = Meter()
        self.staging: Path | None = None
        # The parent refuses a quantized model without adapters; a projector stage trains only what is not quantized.
        unquantized_part = isinstance(stage.tune, Projector) and is_quantized(model)
        if unquantized_part:
            model._hf_peft_config_loaded = True  # type: ignore[assignment]
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(processor.tokenizer.pad_token_id, packed=self.packed),
            processing_class=processor,
            callbacks=callbacks,
        )
        if unquantized_part:
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
        self.checkpoints = CheckpointWriter(
            Path(str(self.args.output_dir)), origin, keep=stage.keep_checkpoints, accelerator=self.accelerator
        )
        self.recomputation = Recomputation(model, auto=stage.gradient_checkpointing == "auto", device=self.args.device)
        # Its table of figures for each step; the run has metrics.jsonl and a progress line.
        self.remove_callback(transformers.PrinterCallback)
        # "token": the parent counts the labels of the whole accumulation and hands the number to compute_loss.
        self.model_accepts_loss_kwargs = stage.loss_average == "token"
        if self.sharded:
            check_sharding_support(stage.tune, stage.name)

    # -- processes ----------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's; FSDP, if it was asked for, is real afterwards."""
        check_fsdp_version()
        super().create_accelerator_and_postprocess()
        self.zero = configure_zero(self.accelerator)
        self.fsdp = enable_sharding(self.accelerator)
        if self.fsdp:
            self.is_fsdp_enabled: bool = True
        self.sharded = bool(self.fsdp) or self.zero

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        if self.sharded and resume_from_checkpoint:
            # While every rank has the whole model still.
            load_trained(self.model, Path(resume_from_checkpoint))
        # DeepSpeed would look for checkpoints of its own.
        resume = None if self.zero else resume_from_checkpoint
        prepared: tuple[nn.Module, Any] = super()._prepare_for_training(max_steps, train_dataloader, resume)
        if self.fsdp == 2:
            check_sharding(prepared[0])
        if self.zero:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    # -- data ---------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset[Item] | None = None) -> Sampler[int]:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        stage = self.stage
        even = Balance(stage.global_batch_size, stage.micro_batch_size, dataset.estimated_tokens)
        return EpochSampler(
            len(dataset), seed=self.recipe.seed, shuffle=stage.data.shuffle, balanced=even if stage.balance else None
        )

    # -- loss ---------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The parent's step, after the batch's faults are taken out and counted; in several passes if it is large."""
        self.ledger.note(inputs.pop("faults"))
        ids = tuple(inputs.pop("ids"))
        self.meter.tokens += sum(inputs["lengths"]) if "lengths" in inputs else int(inputs["attention_mask"].sum())
        inputs[SUPERVISED] = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        self.meter.supervised += inputs[SUPERVISED]
        loss = torch.zeros((), device=self.args.device)
        for part in split_micro_batch(self.accelerator, model, inputs, max_tokens=self.stage.max_tokens):
            loss += super().training_step(model, part, num_items_in_batch)
        self.meter.losses.append((loss, ids))
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross entropy at supervised positions; logits are made for those alone.

        Args:
            model: The model, wrapped as it may be.
            inputs: The batch.
            return_outputs: Whether the model's output is wanted too.
            num_items_in_batch: With ``loss_average="token"``, supervised tokens of the whole optimizer step.

        Returns:
            The loss, or the loss and the output.
        """
        count = inputs.pop(SUPERVISED)
        tokens = inputs["input_ids"].numel()
        self.recomputation.plan(tokens, settled=bool(self.optimizer is not None and self.optimizer.state))
        with self.recomputation.measuring(tokens):
            loss_sum, _, outputs = supervised_loss(model, inputs)
        if num_items_in_batch is None:
            loss = loss_sum / max(count, 1)
        else:
            # The parent's all-reduce averages over the ranks; the count is of all of them.
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss_sum * ranks / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        where = f"{self.stage.name}:step {self.state.global_step + 1}"
        check_finite(self.accelerator, self.meter.losses, float(norm), where=where)
        return norm

    # -- optimizer ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's, its groups divided by part of the model where parts have learning rates of their own."""
        new = self.optimizer is None
        made: torch.optim.Optimizer = super().create_optimizer(model)
        optim = self.stage.optim
        rates = {"projector": optim.projector_learning_rate, "rows": optim.rows_learning_rate}
        if new and any(rate is not None for rate in rates.values()):
            parts = {p: part_of(n) for n, p in (model or self.model).named_parameters() if p.requires_grad}
            made.param_groups = [
                {**group, "params": params, "name": part, "lr": rates.get(part) or optim.learning_rate}
                for part in dict.fromkeys([*sorted(set(parts.values()) - set(rates)), *rates])
                for group in made.param_groups
                if (params := [parameter for parameter in group["params"] if parts[parameter] == part])
            ]
        return made

    def _learning_rates(self, rate: float) -> dict[str, float]:
        """Each part's learning rate, where parts have their own; ``rate`` is that of the first group."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        named = [group for group in groups if "name" in group]
        # The schedule is one for all: rates differ by their peaks' ratio.
        return {group["name"]: rate * group["initial_lr"] / named[0]["initial_lr"] for group in named}

    # -- log ----------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens and time to each step's figures and hands them to the run's log."""
        if "loss" in logs:
            now = time.perf_counter()
            seconds = now - self.meter.since if self.meter.since else 0.0
            counts = torch.tensor([self.meter.tokens, self.meter.supervised], device=self.args.device)
            tokens, supervised = self.accelerator.reduce(counts, reduction="sum").tolist()
            figures: dict[str, Any] = {
                "step": self.state.global_step,
                "epoch": round(float(self.state.epoch or 0.0), 6),
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": tokens,
                "supervised_tokens": supervised,
                "seconds": round(seconds, 4),
                "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            }
            if rates := self._learning_rates(logs["learning_rate"]):
                figures["learning_rates"] = rates
            if torch.cuda.is_available():
                figures["peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
            logs["tokens"] = tokens
            if self.is_world_process_zero():
                self.sink(figures)
        super().log(logs, start_time)
        self.meter = Meter(since=time.perf_counter())

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging) if self.staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent's, into a folder aside; without its rotation, which would count what is there now."""
        whole = super()._save_checkpoint
        limit, self.args.save_total_limit = self.args.save_total_limit, None

        def save(staging: Path) -> None:
            self.staging = staging
            whole(model, trial)

        try:
            self.checkpoints.write(self.state.global_step, save, ending=self.control.should_training_stop)
        finally:
            self.args.save_total_limit = limit
            self.staging = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's; shards are gathered by all ranks and written by the first.

        Args:
            output_dir: The folder.
            _internal_call: As the parent's.
        """
        if self.zero or not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        state = gathered_state(self.model, trained_only=isinstance(self.stage.tune, Lora))
        self._save(output_dir, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not (self.zero or self.fsdp == 2):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_states(*self._stepped(), self._shard_file(output_dir), weights=self.zero)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not (checkpoint and (self.zero or self.fsdp == 2)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_states(*self._stepped(), self._shard_file(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _stepped(self) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
        """What this rank's optimizer steps, by name, and the optimizer itself."""
        wrapped: Any = self.optimizer
        return masters(wrapped.optimizer) if self.zero else (dict(self.model.named_parameters()), wrapped.optimizer)

    def _shard_file(self, folder: str) -> Path:
        return Path(folder) / f"optimizer_{self.args.process_index}_of_{self.args.world_size}.safetensors"

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Save the model whole, under a plain model's names, and its processor (and no pickled arguments)."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        state = dict(state_dict) if state_dict is not None else model.state_dict()
        save_whole(model, self.processing_class, folder, state=state, tune=self.stage.tune, base=self.base)
        if isinstance(self.stage.tune, Lora):
            run = Path(str(self.args.output_dir))
            write_card(folder, self.recipe, self.stage, run=run, step=self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.sharded:  # else it was done while the model was whole
            load_trained(self.model, Path(resume_from_checkpoint))
