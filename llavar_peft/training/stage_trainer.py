"""One stage of a recipe on ``transformers.Trainer``.

Adds to it: logits at supervised positions only, the configured average of the loss, an order of records that depends on
(seed, epoch) alone, a learning rate for each part of the model, and atomic checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME

from llavar_peft.compat.trainer_internals import TrainerInternals, allow_quantized_base
from llavar_peft.data.epoch_sampler import Balance, EpochSampler
from llavar_peft.data.training_dataset import PLACES, SUPERVISED_PLACES, Collator, TrainingDataset
from llavar_peft.models.decoder_structure import check_length
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.models.tuning import is_quantized
from llavar_peft.recipe.schema import Lora, ModelConfig, Projector, Recipe, Stage
from llavar_peft.training.activation_checkpointing import Recomputation
from llavar_peft.training.checkpoint_folders import RunInputs
from llavar_peft.training.checkpoint_writer import CheckpointWriter
from llavar_peft.training.dropped_records import DroppedRecords
from llavar_peft.training.model_card import write_card
from llavar_peft.training.optimizer_step import (
    StepCounts,
    StepFigures,
    check_finite,
    fetch_figures,
    learning_rates,
    log_line,
    split_groups,
)
from llavar_peft.training.read_shards import shard_pending
from llavar_peft.training.save_weights import load_trained, save_trained
from llavar_peft.training.sharding import (
    check_sharding,
    choose_layers,
    configure_sharding,
    gather_weights,
)
from llavar_peft.training.step_images import share_tower_calls
from llavar_peft.training.supervised_loss import SUPERVISED, split_micro_batch, supervised_loss
from llavar_peft.training.training_state import load_training_state, save_training_state

LogSink = Callable[[dict[str, Any]], None]


class StageTrainer(TrainerInternals):
    """Train one stage.

    Args:
        model: The model that ``apply_tuning`` returned.
        processor: Saved with every checkpoint.
        stage: The stage of the recipe.
        arguments: The stage's settings, from ``training_arguments``.
        packed: Whether rows are packed; the model's attention must support it.
        dataset: The records to train on.
        dropped: Counts records that cannot be trained on.
        inputs: What a resumed run must share with this one.
        base: The model that the stage starts from, as an adapter names it.
        recipe: The run.
        sink: Called with the figures of each step.
        callbacks: Callbacks for ``transformers.Trainer``.
    """

    def __init__(  # noqa: PLR0913 - all by name, from one place
        self,
        model: nn.Module,
        processor: LlavarProcessor,
        stage: Stage,
        arguments: transformers.TrainingArguments,
        *,
        packed: bool,
        dataset: TrainingDataset,
        dropped: DroppedRecords,
        inputs: RunInputs,
        base: ModelConfig,
        recipe: Recipe,
        sink: LogSink,
        callbacks: list[transformers.TrainerCallback],
    ) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimized: list[list[Tensor]] = [[]]
        llavar: Any = model
        check_length(llavar.get_decoder(), stage.max_length)
        self.stage = stage
        self.dropped = dropped
        self.base = base
        self.recipe = recipe
        self.sink = sink
        self.counts = StepCounts()
        self.figures = StepFigures()
        self.learning_rate = 0.0
        # A projector stage trains only parameters that are not quantized.
        without_adapters = isinstance(stage.tune, Projector) and is_quantized(model)
        model_config: Any = model.config
        collator = Collator(processor.tokenizer.pad_token_id, packed=packed, image_token_id=model_config.image_token_id)
        with allow_quantized_base(model) if without_adapters else nullcontext():
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=dataset,
                data_collator=collator,
                processing_class=processor,
                callbacks=callbacks,
            )
        self.checkpoints = CheckpointWriter(
            Path(str(self.args.output_dir)), inputs, keep=stage.keep_checkpoints, accelerator=self.accelerator
        )
        # What cross-attention keeps depends on the images of a pass rather than on its tokens: all layers recompute.
        can_choose = stage.gradient_checkpointing == "auto" and model_config.cross_attention is None
        self.recomputation = Recomputation(model, auto=can_choose, device=self.args.device)
        # The run has metrics.jsonl and a progress bar instead of a table of every step.
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(_StageEvents(self))
        # Makes the parent count the labels of the whole optimizer step and pass the number to compute_loss.
        self.model_accepts_loss_kwargs = stage.loss_average == "token"

    # -- processes ----------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and make sure that FSDP is active if it was requested."""
        super().create_accelerator_and_postprocess()
        # The cache would hold a copy of all trained weights in half precision until the end of each forward pass,
        # while every weight is used only once.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.sharding = configure_sharding(self.accelerator, fp32_reduction=self.stage.fp32_reduction)
        if self.sharding == "fsdp2":
            self.is_fsdp_enabled: bool = True

    def load_weights(self, checkpoint: Path) -> None:
        """Load what the stage had trained when the checkpoint was written."""
        load_trained(self.model, checkpoint)

    def shard_pending(self) -> None:
        """Shard a model whose weights are still to be read."""
        if self.sharding == "fsdp2":
            choose_layers(self.model, self.accelerator)
        if self.model.pending_weights is not None and self.sharding is not None:
            shard_pending(self.model, self.accelerator, self.sharding)

    def check_prepared(self, model: nn.Module) -> None:
        """Check that FSDP2 has sharded the model."""
        if self.sharding == "fsdp2":
            check_sharding(model)
        if self.sharding == "fsdp2" and self.optimizer is not None and isinstance(self.optimized[0][0], DTensor):
            # Accelerate replaces whole parameters by shards, by their addresses. These were shards before, and those
            # that are empty on this rank have one address.
            for group, parameters in zip(self.optimizer.param_groups, self.optimized, strict=True):
                group["params"] = parameters

    def load_training_state(self, checkpoint: Path) -> None:
        """Load the states of optimizer, schedule and loss scaler."""
        load_training_state(self, checkpoint, self.sharding)

    # -- data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of this rank, in an order that depends on (seed, epoch) alone."""
        dataset: Any = self.train_dataset
        stage = self.stage
        balance = None
        if stage.balance:
            balance = Balance(stage.global_batch_size, stage.micro_batch_size, dataset.estimated_tokens)
        seed, shuffle = self.recipe.seed, stage.data.shuffle
        draw = dataset.draw(seed=seed, shuffle=shuffle)
        sampler = EpochSampler(len(dataset), seed=seed, shuffle=shuffle, balanced=balance, draw=draw)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=self.args.train_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """Return the micro batches of an optimizer step, with the features of patches in place of images."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.sharding is None:
            with self.accelerator.autocast():
                share_tower_calls(self.model, batches)
        return batches, num_items

    # -- loss ---------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Record the batch's faults, then run forward and backward passes of at most ``max_tokens`` tokens."""
        self.dropped.add(inputs.pop("faults"))
        ids = tuple(inputs.pop("ids"))
        self.counts.tokens += inputs.pop("tokens")
        inputs[SUPERVISED] = sum(inputs[PLACES[SUPERVISED_PLACES]])
        self.counts.supervised += inputs[SUPERVISED]
        loss = torch.zeros((), device=self.args.device)
        for pass_inputs in split_micro_batch(self.accelerator, model, inputs, max_tokens=self.stage.max_tokens):
            loss += super().training_step(model, pass_inputs, num_items_in_batch)
        self.counts.losses.append((loss, ids))
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the cross entropy of one pass at supervised positions; logits are computed for those alone.

        Args:
            num_items_in_batch: With ``loss_average="token"``, number of supervised tokens of the optimizer step.
        """
        count = inputs.pop(SUPERVISED)
        tokens = inputs["input_ids"].numel()
        self.recomputation.plan(tokens, has_states=bool(self.optimizer is not None and self.optimizer.state))
        with self.recomputation.measure(tokens):
            loss_sum, _, outputs = supervised_loss(model, inputs)
        if num_items_in_batch is None:
            loss = loss_sum / max(count, 1)
        else:
            # The gradients are averaged over the ranks, while the number is that of all ranks.
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss_sum * ranks / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def fetch_norm(self, norm: Tensor | float) -> float:
        """Return the gradient's norm, fetched together with everything else that the host needs of the step."""
        self.figures = fetch_figures(self.accelerator, self.counts, norm)
        return self.figures.norm

    def check_step(self) -> None:
        """Raise an error before an optimizer step on a loss or gradient that is not finite."""
        where = f"{self.stage.name}:step {self.state.global_step + 1}"
        check_finite(self.accelerator, self.counts, self.figures, where=where)
        # The rate of this step: the schedule moves on before the step's line is written.
        self.learning_rate = self.optimizer.param_groups[0]["lr"] if self.optimizer is not None else 0.0

    # -- optimizer ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with groups for the parts of the model that have their own learning rate."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new:
            split_groups(optimizer, model or self.model, self.stage)
            self.optimized = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters with weight decay, which has no use for vectors: norms, biases, scales."""
        # ZeRO-3 replaces the parameters by parts of them without a shape.
        vectors = {
            name
            for name, parameter in model.named_parameters()
            if len(getattr(parameter, "ds_shape", parameter.shape)) < 2
        }
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if name not in vectors]

    # -- log ----------------------------------------------------------------------------------------------------------

    def log_step(self) -> None:
        """Pass the figures of a step to the sink and to the callbacks.

        ``transformers.Trainer``'s own log is disabled: it fetches loss and norm from the device once more.
        """
        figures = self.figures
        loss_and_rate = {"loss": figures.loss, "learning_rate": self.learning_rate}
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        rates = learning_rates(groups, self.learning_rate)
        line = {
            "step": self.state.global_step,
            "epoch": round(float(self.state.epoch or 0.0), 6),
            **loss_and_rate,
            "grad_norm": figures.norm,
            **log_line(figures, self.counts.started),
            **({"learning_rates": rates} if rates else {}),
        }
        if self.is_world_process_zero():
            self.sink(line)
        self.log({**loss_and_rate, "grad_norm": figures.norm, "tokens": figures.tokens})

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write a checkpoint that appears only when it is complete, and report it to the callbacks."""
        step, ending = self.state.global_step, self.control.should_training_stop
        self.store_flos()
        self.checkpoints.write(step, self._write_checkpoint, ending=ending)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder))
        save_training_state(self, folder, self.sharding)
        if self.args.should_save:
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights under a plain model's names, and the processor."""
        is_lora = isinstance(self.stage.tune, Lora)
        state = gather_weights(self.model_wrapped, self.accelerator, self.sharding, trained_only=is_lora)
        if not self.args.should_save:
            return
        stage_folder = Path(str(self.args.output_dir))
        folder = Path(output_dir) if output_dir else stage_folder
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        save_trained(model, self.processing_class, folder, state=state, tune=self.stage.tune, base=self.base)
        if is_lora:
            write_card(folder, self.recipe, self.stage, run=stage_folder, step=self.state.global_step)


class _StageEvents(transformers.TrainerCallback):
    """Calls the stage trainer at the events at which it acts. Added last, so that it sees every request to save."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint is saved in ``on_log``, so that the line of its step is in metrics.jsonl before it.
        self.trainer.log_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.trainer.counts = StepCounts(started=time.perf_counter())
            if control.should_save:
                self.trainer.save_checkpoint()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self.trainer.save_checkpoint()
