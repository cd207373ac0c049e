"""One stage on ``transformers.Trainer``: what the recipe needs beside it, and nothing else.

Added here: logits at supervised positions only, the loss's average as configured, an order of records that depends on
(seed, epoch) alone, parameter groups, and checkpoints that are whole and appear at once.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from llavar_peft.config import Lora, ModelConfig, Projector, Recipe, Stage
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.dataset import Collator, EpochSampler, Item, TrainingDataset
from llavar_peft.durable import settle_folder
from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.models.packed import let_pack, packed_arguments
from llavar_peft.models.processing import LlavarProcessor
from llavar_peft.models.tuning import folded_state_dict, is_quantized, part_of
from llavar_peft.training import files
from llavar_peft.training.card import write_card
from llavar_peft.training.ledger import FaultLedger
from llavar_peft.training.saving import load_trained, save_whole

LogSink = Callable[[dict[str, Any]], None]


@dataclass
class Meter:
    """Counts of the optimizer step under way, on this rank."""

    tokens: int = 0
    supervised: int = 0
    records: tuple[str, ...] = ()
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
        ledger: FaultLedger,
        base: ModelConfig,
        recipe: Recipe,
        sink: LogSink,
        callbacks: list[transformers.TrainerCallback],
    ) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        packed = stage.packing and let_pack(model)
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
            data_collator=Collator(processor.tokenizer.pad_token_id, packed=packed),
            processing_class=processor,
            callbacks=callbacks,
        )
        if unquantized_part:
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
        # Its table of figures for each step; the run has metrics.jsonl and a progress line.
        self.remove_callback(transformers.PrinterCallback)
        # "token": the parent counts the labels of the whole accumulation and hands the number to compute_loss.
        self.model_accepts_loss_kwargs = stage.loss_average == "token"

    # -- data ---------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset[Item] | None = None) -> Sampler[int]:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        return EpochSampler(len(dataset), seed=self.recipe.seed, shuffle=self.stage.data.shuffle)

    # -- loss ---------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The parent's step, after the batch's faults are taken out and counted."""
        self.ledger.note(inputs.pop("faults"))
        ids = tuple(inputs.pop("ids"))
        self.meter.records += ids
        self.meter.tokens += sum(inputs["lengths"]) if "lengths" in inputs else int(inputs["attention_mask"].sum())
        self.meter.supervised += int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
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
        inputs.pop("faults", None)
        inputs.pop("ids", None)
        loss_sum, count, outputs = supervised_loss(model, inputs)
        if num_items_in_batch is None:
            loss = loss_sum / max(count, 1)
        else:
            # The parent's all-reduce averages over the ranks; the count is of all of them.
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss_sum * ranks / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        value = float(norm) if norm is not None else 0.0
        if not math.isfinite(value):
            raise EnvironmentFaultError.at(
                f"{self.stage.name}:step {self.state.global_step + 1}",
                f"the gradient is not finite (norm {value}), records {', '.join(self.meter.records[:16])}",
                "look at these records, lower the learning rate, or train in bf16 instead of fp16; nothing was updated",
            )
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
        """Adds tokens and time to each step's figures and hands them to the run's log."""
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
        """Writes a checkpoint aside; rank 0 gives it its name after all ranks have written."""
        run = Path(str(self.args.output_dir))
        name = f"{files.CHECKPOINT_PREFIX}{self.state.global_step}"
        self.staging = run / files.STAGING
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.is_world_process_zero():
                shutil.rmtree(self.staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                settle_folder(self.staging / name, run / name)
                shutil.rmtree(self.staging, ignore_errors=True)
                for old in files.checkpoints(run)[: -max(1, self.stage.keep_checkpoints)]:
                    shutil.rmtree(old)
            self.accelerator.wait_for_everyone()
        finally:
            self.args.save_total_limit = limit
            self.staging = None

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Saves the model whole, under a plain model's names, and its processor (and no pickled arguments)."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        state = dict(state_dict) if state_dict is not None else model.state_dict()
        save_whole(
            model, self.processing_class, folder, state=folded_state_dict(state), tune=self.stage.tune, base=self.base
        )
        if isinstance(self.stage.tune, Lora):
            run = Path(str(self.args.output_dir))
            write_card(folder, self.recipe, self.stage, run=run, step=self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint))


def supervised_loss(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, int, Any]:
    """Runs the model and sums the cross entropy of the next token over supervised positions.

    Args:
        model: A LLaVAR, wrapped as it may be.
        inputs: A batch of ``Collator``'s, without what is for the trainer.

    Returns:
        The sum in float32, the number of supervised positions, and the model's output. Without a supervised position
        the sum is 0 and still hangs on every trained parameter.
    """
    labels = inputs["labels"]
    targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    supervised = targets != IGNORE_INDEX
    count = int(supervised.sum())
    # One index for all rows: the positions where any row is supervised.
    positions = supervised.any(dim=0).nonzero()[:, 0]
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.int64, device=labels.device)
    forwarded = {name: value for name, value in inputs.items() if name not in ("labels", "lengths")}
    if "lengths" in inputs:
        forwarded.update(packed_arguments(inputs["lengths"], _unwrapped(model), labels.device))
    outputs = model(**forwarded, logits_to_keep=positions, use_cache=False)
    logits = outputs.logits.float()
    if count == 0:
        return logits.sum() * 0.0, 0, outputs
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets[:, positions].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return loss, count, outputs


def _unwrapped(model: Any) -> Any:
    """The model whose configuration says which attention it has: within DDP's wrapper, if there is one."""
    while not hasattr(model, "config"):
        model = model.module
    return model
