"""The contenders of ``train.py``, each a ``transformers.Trainer`` ready to train the same model on the same records."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import train_original
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from train_model import Records, Shape, build
from transformers import LlavaForConditionalGeneration, LlavaModel

from llavar_peft import DataConfig, Full, Lora, ModelConfig, OptimConfig, Projector, Recipe, Stage
from llavar_peft.models.build_model import build_model
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.tuning import TRAINED_ROWS, apply_tuning, lora_config
from llavar_peft.recipe.schema import Precision, Recompute, Tune
from llavar_peft.training.checkpoint_folders import RunInputs
from llavar_peft.training.dropped_records import DroppedRecords
from llavar_peft.training.stage_arguments import training_arguments
from llavar_peft.training.stage_trainer import StageTrainer

TUNES: dict[str, Tune] = {
    "stage1": Projector(),
    "stage2": Full(),
    "lora": Lora(rank=16, alpha=32.0, dropout=0.0),
}
"""Without dropout, so that losses can be compared."""
LENGTHS = {"stage1": "stage1", "stage2": "stage2", "lora": "stage2"}
BATCH = {"stage1": 4, "stage2": 4, "lora": 4}
"""Number of records in a forward pass: the original's on each GPU in stage 2; its 8 in stage 1 pad slightly more."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The task of one contender.

    Attributes:
        stage: A key of ``TUNES``.
        shape: Size of the model.
        batch: Number of records of a step.
        steps: Number of optimizer steps.
        folder: Folder for the trainer's files.
        workers: Number of processes that make items.
    """

    stage: str
    shape: Shape
    batch: int
    steps: int
    folder: Path
    workers: int = 0


def stage_of(
    cell: Cell, *, tune: Tune | None = None, packing: bool, recompute: Recompute, precision: Precision = "fp32"
) -> Stage:
    """Return a stage for a contender, with a constant learning rate and the order of the data.

    Args:
        cell: The contender's task.
        tune: What the stage trains; None means the cell's.
        packing: The field of ``Stage``.
        recompute: The field ``gradient_checkpointing`` of ``Stage``.
        precision: The field of ``Stage``.
    """
    return Stage(
        name=cell.stage,
        data=DataConfig(records="random", shuffle=False, workers=cell.workers),
        tune=TUNES[cell.stage] if tune is None else tune,
        optim=OptimConfig(learning_rate=1e-4, schedule="constant", warmup_ratio=0.0),
        max_steps=cell.steps,
        global_batch_size=cell.batch,
        micro_batch_size=cell.batch,
        packing=packing,
        precision=precision,
        gradient_checkpointing=recompute,
    )


def arguments_of(cell: Cell, stage: Stage) -> tuple[Recipe, transformers.TrainingArguments]:
    """Return a run with this stage alone, and its training arguments."""
    recipe = Recipe(model=ModelConfig(checkpoint="random"), stages=(stage,), output_dir=str(cell.folder))
    return recipe, training_arguments(recipe, stage, cell.folder, ranks=1)


def peer_arguments(cell: Cell, stage: Stage) -> transformers.TrainingArguments:
    """Return the same arguments for a trainer that, unlike the library's, logs its losses through transformers."""
    arguments = arguments_of(cell, stage)[1]
    return arguments.set_logging(strategy="steps", steps=1, report_to=[], level="error")


def ours(cell: Cell, records: Dataset[Any], callback: Any, *, model: Any, stage: Stage, trainer: Any = None) -> Any:
    """Return the library's trainer.

    Args:
        cell: The contender's task.
        records: The items.
        callback: The callback of the benchmark.
        model: The model that ``apply_tuning`` returned.
        stage: The stage from ``stage_of``.
        trainer: The class of the trainer; None means ``StageTrainer``.
    """
    recipe, arguments = arguments_of(cell, stage)
    dataset: Any = records
    return (trainer or StageTrainer)(
        model,
        processor(),
        stage,
        arguments,
        packed=stage.packing and enable_packing(model),
        dataset=dataset,
        dropped=DroppedRecords(cell.folder / "dropped.jsonl", stage.data, total=len(dataset)),
        inputs=RunInputs(ranks=1, records={}),
        base=recipe.model,
        recipe=recipe,
        sink=lambda _: None,
        callbacks=[callback],
    )


def contender(name: str, cell: Cell, records: Records, callback: Any) -> Any:
    """Return the trainer of a contender; its ``train()`` is measured.

    Args:
        name: ``original``, ``original, keeping``, ``ours, recomputing``, ``ours``, ``trl``, or a lever of ours:
            ``padded``, ``all logits``, ``whole tower``, ``dropout``.
        cell: The contender's task.
        records: The items.
        callback: The callback of the benchmark.
    """
    if name.startswith("original"):
        stage = stage_of(cell, packing=False, recompute="keeping" not in name)
        model = train_original.prepare(seeded(build(cell.shape)), stage.tune)
        return train_original.OriginalTrainer(model, peer_arguments(cell, stage), records, [callback])
    if name == "trl":
        return _trl(cell, records, callback)
    tune: Any = TUNES[cell.stage]
    if name == "dropout":
        tune = dataclasses.replace(tune, dropout=0.05)
    recompute: Recompute = name == "ours, recomputing" or "auto"
    stage = stage_of(cell, tune=tune, packing=name != "padded", recompute=recompute)
    plain = build(cell.shape)
    if name == "whole tower":
        plain.model.get_image_features = MethodType(LlavaModel.get_image_features, plain.model)  # computes all layers
    trainer = AllLogits if name == "all logits" else None
    return ours(cell, records, callback, model=apply_tuning(seeded(plain), stage.tune), stage=stage, trainer=trainer)


def seeded(model: Any) -> Any:
    """Return the model unchanged, with the seed set so that every contender gets the same adapters."""
    torch.manual_seed(1)
    return model


class AllLogits(StageTrainer):
    """Ours with logits at every position and the plain loss over them."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the cross entropy over all logits."""
        core = _WithAllLogits(model)
        return super().compute_loss(core, inputs, return_outputs, num_items_in_batch)


class _WithAllLogits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, targets: Tensor, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        logits = outputs.logits.float().flatten(0, 1)
        outputs.loss = nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
        return outputs


def _trl(cell: Cell, records: Records, callback: Any) -> Any:
    """Return TRL's trainer with its defaults on transformers' LLaVA: it recomputes, and pads."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):  # type: ignore[misc, unused-ignore]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return train_original.SequentialSampler(self.train_dataset)

    arguments = peer_arguments(cell, stage_of(cell, packing=False, recompute=True))
    # Copied by name, because neither class can be built from the other.
    names = (
        "output_dir per_device_train_batch_size max_steps learning_rate lr_scheduler_type weight_decay use_cpu"
        " remove_unused_columns disable_tqdm logging_strategy logging_steps save_strategy report_to seed bf16 fp16"
        " gradient_checkpointing_kwargs log_level"
    )
    given = {name: getattr(arguments, name) for name in names.split()}
    settings = SFTConfig(**given, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    trainer = InOrder(
        model=stock(build(cell.shape), TUNES[cell.stage]),
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"number": range(len(records))}),
        data_collator=lambda rows: train_original.padded([records[row["number"]] for row in rows]),
        processing_class=processor(),
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def stock(model: Any, tune: Tune) -> Any:
    """Return transformers' LLaVA with a LLaVAR's weights: the projector is its first layer, its second the identity.

    Args:
        model: A LLaVAR.
        tune: What to train.
    """
    from peft import get_peft_model
    from transformers import LlavaConfig

    ours_ = model.config
    config = LlavaConfig(
        text_config=ours_.text_config,
        vision_config=ours_.vision_config,
        image_token_id=ours_.image_token_index,
        projector_hidden_act="linear",
        vision_feature_layer=ours_.vision_feature_layer,
        vision_feature_select_strategy=ours_.vision_feature_select_strategy,
    )
    made: Any = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    names = "model.multi_modal_projector."
    state = {name.replace(names, f"{names}linear_1."): value for name, value in model.state_dict().items()}
    made.load_state_dict(state, strict=False)
    second = made.model.multi_modal_projector.linear_2
    nn.init.eye_(second.weight)
    nn.init.zeros_(second.bias)
    made.requires_grad_(False)
    if isinstance(tune, Lora):
        return get_peft_model(seeded(made), dataclasses.replace(lora_config(tune), modules_to_save=["linear_1"]))
    made.model.multi_modal_projector.linear_1.requires_grad_(True)
    if isinstance(tune, Full):
        made.model.language_model.requires_grad_(True)
        made.lm_head.requires_grad_(True)
        return made
    embeddings = made.get_input_embeddings().weight.requires_grad_(True)
    embeddings.register_hook(_last_rows_only)
    return made


def _last_rows_only(gradient: Tensor) -> Tensor:
    kept = gradient.new_zeros(gradient.shape)
    kept[-TRAINED_ROWS:] = gradient[-TRAINED_ROWS:]
    return kept


@lru_cache(maxsize=1)
def processor() -> Any:
    """Return a processor, of which only the pad token is used."""
    parts = Path(str(files("llavar_peft") / "assets/tiny"))
    tiny = ModelConfig(language_model=str(parts / "language_model"), vision_tower=str(parts / "vision_tower"))
    return build_model(tiny)[1]


def import_all() -> None:
    """Import what the contenders need, so that none of them is charged for it; a missing TRL is reported later."""
    processor()
    for name in ("datasets", "deepspeed", "trl.trainer.sft_trainer"):  # accelerate imports the second
        with suppress(ImportError):
            import_module(name)
