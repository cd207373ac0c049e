"""The runs of ``test_sharding.py``. The first word of a run's name says how the ranks train it (``sharded.py``)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from llavar_peft import CrossAttention, Full, Lora, ModelConfig, Projector, Recipe, Stage, Tiles
from llavar_peft.recipe.schema import Kernels, Quantization
from tests.parts.tiny_parts import save_language_model, save_tower

_OTHER_PARTS = {"qwen2": "siglip", "gemma2": "dinov2", "qwen3": "aimv2_vision_model"}
"""Language models with their towers. The embeddings of the first two are tied."""
_LORA = Lora(rank=4, alpha=8, dropout=0.0)
_TOWER_LORA = dataclasses.replace(_LORA, tower_rank=2)


class Run(NamedTuple):
    """The stages of a run, and settings of its model. A stage of four steps is interrupted and resumed."""

    stages: tuple[Stage, ...]
    quantize: Quantization | None = None
    kernels: Kernels = "none"


class _Stages:
    """Variants of a stage that several runs have, so that one process trains each of them once."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.data = dataclasses.replace(recipe.stages[0].data, **_write_records(recipe, folder))
        first, second = (
            dataclasses.replace(
                stage, data=self.data, micro_batch_size=1, probe=dataclasses.replace(stage.probe, images=1)
            )
            for stage in recipe.stages
        )
        self.projector = dataclasses.replace(first, max_steps=2)
        self.full = dataclasses.replace(second, max_steps=4)
        self.tied = dataclasses.replace(self.full, max_length=512)
        self.lora = dataclasses.replace(self.full, tune=_LORA)
        self.half = dataclasses.replace(short(self.full), precision="bf16", gradient_checkpointing=True)
        # The ranks have different numbers of images and of sizes, so that they call the tower differently often.
        keep = dataclasses.replace(self.data, image_mode="keep")
        self.sizes = dataclasses.replace(short(self.full), data=keep, micro_batch_size=2)
        adamw_8bit = dataclasses.replace(self.lora.optim, optimizer="adamw_8bit")
        self.adamw_8bit = dataclasses.replace(self.lora, optim=adamw_8bit)
        # Without the evaluation of held-out records, which takes as long as a step.
        without_holdout = dataclasses.replace(self.data, holdout=0)
        self.quiet = dataclasses.replace(self.full, data=without_holdout)
        self.memory = dataclasses.replace(self.half, tune=Projector(), data=without_holdout, max_steps=1)
        self.compiled = dataclasses.replace(short(self.quiet), tune=_LORA, gradient_checkpointing=True)


def short(stage: Stage) -> Stage:
    """Return a stage with two steps, which is not interrupted."""
    return dataclasses.replace(stage, max_steps=2)


def _fsdp_runs(stages: _Stages) -> dict[str, Run]:
    passes = dataclasses.replace(
        stages.half, global_batch_size=8, micro_batch_size=2, max_length=256, max_tokens=256, fp32_reduction=True
    )
    # Of rank 1, so that the second process has no part of A.
    dora = Lora(rank=1, alpha=8, variant="dora", train_image_rows=True)
    crossed = dataclasses.replace(short(stages.lora), gradient_checkpointing=True)
    return {
        "both-plain": Run((stages.projector, stages.full)),
        "both-dora": Run((dataclasses.replace(short(stages.quiet), tune=dora),)),
        "resumed-nf4": Run((stages.lora,), "nf4"),
        "run-half": Run((passes,)),
        "run-quantized": Run((dataclasses.replace(stages.half, tune=_LORA),), "nf4"),
        "shard-qwen2": Run((stages.tied,)),
        "run-gemma2": Run((dataclasses.replace(short(stages.tied), tune=_LORA),)),
        "run-qwen3": Run((dataclasses.replace(short(stages.tied), tune=_LORA),), "nf4"),
        "refused-optimizer": Run((stages.adamw_8bit,)),
        "refused-int8": Run((stages.lora,), "int8"),
        "run-tower": Run((dataclasses.replace(short(stages.quiet), tune=Full(train_tower=True)),)),
        "shard-tiles": Run((short(stages.full),), kernels="liger"),
        "shard-crossed": Run((stages.projector, crossed)),
        "shard-compile": Run((stages.compiled,), kernels="compile"),
        "memory-half": Run((stages.memory,)),
    }


def _zero_runs(stages: _Stages) -> dict[str, Run]:
    return {
        "shard-plain": Run((stages.projector, stages.full)),
        "resumed-nf4": Run((stages.lora,), "nf4"),
        "zero1-full": Run((stages.quiet,)),
        "zero2-nf4": Run((short(stages.lora),), "nf4"),
        "offload2-full": Run((short(stages.quiet),)),
        "offload3-full": Run((stages.quiet,)),
        "run-int8": Run((short(stages.lora),), "int8"),
        "run-half": Run((dataclasses.replace(stages.half, data=stages.sizes.data, micro_batch_size=2, tune=_LORA),)),
        "run-qwen2": Run((short(stages.tied),)),
        "zero2-gemma2": Run((short(stages.tied),)),
        "run-tower": Run((dataclasses.replace(stages.sizes, tune=_TOWER_LORA),), kernels="liger"),
        "run-tiles": Run((short(stages.lora),)),
        "run-crossed": Run((dataclasses.replace(short(stages.lora), micro_batch_size=2),)),
        "shard-compile": Run((stages.compiled,), kernels="compile"),
        "refused-optimizer": Run((stages.adamw_8bit,)),
        "memory-half": Run((stages.memory,)),
    }


def _group_runs(stages: _Stages) -> dict[str, Run]:
    return {"shard-full": Run((stages.quiet,)), "resumed-nf4": Run((stages.lora,), "nf4")}


_NIGHTLY = frozenset(
    (
        "shard-qwen2", "run-gemma2", "run-qwen3", "zero1-full", "offload2-full", "run-int8", "run-qwen2",
        "zero2-gemma2", "run-tiles", "run-crossed", "offload3-full",
    )
)  # fmt: skip
"""Runs that are left out unless ``LLAVAR_SHARDING`` is ``all``; each resembles another run."""
_RUNS = {"FSDP2": _fsdp_runs, "ZeRO-3": _zero_runs, "FSDP2 in two groups": _group_runs}


def sharding_recipes(recipe: Recipe, engine: str, folder: Path) -> dict[str, Recipe]:
    """Return the runs of an engine by name.

    Args:
        recipe: Both stages on the tiny model.
        engine: A key of ``_RUNS``.
        folder: Of records and models, which are written once.
    """
    found = {}
    for name, run in _RUNS[engine](_Stages(recipe, folder)).items():
        if name in _NIGHTLY and os.environ.get("LLAVAR_SHARDING") != "all":
            continue
        kind = name.partition("-")[2]
        dtype: Any = "bfloat16" if run.stages[0].precision == "bf16" else "float32"
        model = dataclasses.replace(recipe.model, dtype=dtype, quantize=run.quantize, kernels=run.kernels)
        if kind in _OTHER_PARTS:
            model = _save_other_parts(model, kind, folder)
        if kind == "tiles":
            model = dataclasses.replace(model, resolution=Tiles(max_tiles=2))
        if kind == "crossed":
            model = dataclasses.replace(model, resolution=CrossAttention(grid=2))
        if name.startswith("memory"):
            model = dataclasses.replace(model, language_model=_save_larger_model(recipe.model, folder / "larger"))
        found[name] = dataclasses.replace(recipe, model=model, stages=run.stages, process_timeout=600)
    return found


def _write_records(tiny_recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Write records of which every third has no image, and every third one of another shape; return data settings."""
    data = tiny_recipe.stages[0].data
    records = folder / "records.json"
    settings = {"records": str(records), "images": (str(data.images), str(folder))}
    if records.is_file():
        return settings
    raw = json.loads(Path(str(data.records)).read_text())
    for number, record in enumerate(raw):
        if number % 3 == 0:
            del record["image"]
            record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>", "").strip()
        elif number % 3 == 1:
            image = Image.open(Path(str(data.images)) / record["image"]).convert("RGB")
            record["image"] = f"narrow-{number}.png"
            image.resize((image.width // 2, image.height)).save(folder / record["image"])
    records.write_text(json.dumps(raw))
    return settings


def _save_other_parts(model: ModelConfig, kind: str, folder: Path) -> ModelConfig:
    parts = {"language_model": (save_language_model, kind), "vision_tower": (save_tower, _OTHER_PARTS[kind])}
    for save, name in parts.values():
        if not (folder / name).exists():
            save(name, folder / name)
    return dataclasses.replace(model, **{part: str(folder / name) for part, (_, name) in parts.items()})


def _save_larger_model(small: ModelConfig, folder: Path) -> str:
    """Save a language model of 164 MB, and return its folder."""
    if not folder.exists():
        shutil.copytree(str(small.language_model), folder)
        config = LlamaConfig.from_pretrained(folder, hidden_size=512, head_dim=128, intermediate_size=8192)
        config.num_hidden_layers = 6
        LlamaForCausalLM(config).half().save_pretrained(folder)
    return str(folder)
