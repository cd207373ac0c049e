"""What the types alone cannot say of a recipe: ranges, and settings that are each right and wrong together.

Each rule yields ``(dotted path, what is wrong, fix)``; ``llavar_peft.recipe.validate`` puts them into one error.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from llavar_peft.constants import LINEAR_LAYERS, METRICS_FILE, RESOLVED_RECIPE_FILE, VERSIONS_FILE
from llavar_peft.recipe.field_paths import nearest
from llavar_peft.recipe.schema import (
    DataConfig,
    Full,
    Lora,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    Projector,
    Recipe,
    Stage,
)

Violation = tuple[str, str, str]
"""Dotted path, what is wrong, fix."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
# What a run itself writes into its folder, beside the stages' folders.
_TAKEN = frozenset({METRICS_FILE, RESOLVED_RECIPE_FILE, VERSIONS_FILE, "adapter", "index.html", "model", "stages.json"})
_MAX_SEED = 2**32 - 1  # numpy's seed, which transformers.set_seed sets too, is 32 bits wide


def find_violations(recipe: Recipe) -> Iterator[Violation]:
    """Yield everything that is wrong with a recipe whose types are right.

    Args:
        recipe: The recipe, each field of its declared type.

    Yields:
        One ``(dotted path, what is wrong, fix)`` for each broken rule.
    """
    yield from _filled("output_dir", recipe.output_dir)
    if not 0 <= recipe.seed <= _MAX_SEED:
        yield "seed", f"expected an integer from 0 to {_MAX_SEED}, got {recipe.seed}", "take a smaller seed"
    yield from _texts("report_to", recipe.report_to)
    yield from _model(recipe.model)
    if not recipe.stages:
        yield "stages", "there is no stage", "add one, for example projector_pretraining(...) or lora(...)"
    yield from _stage_names(recipe.stages)
    for index, stage in enumerate(recipe.stages):
        yield from _stage(f"stages.{index}", stage)
        yield from _stage_on_model(f"stages.{index}", stage, recipe.model)
        yield from _stage_in_order(f"stages.{index}", index, recipe)


def trains_image_rows(recipe: Recipe, stage: Stage) -> bool:
    """Whether a stage trains the ``<im_start>``/``<im_end>`` rows apart from the rest of the embeddings.

    Args:
        recipe: The run.
        stage: One of its stages.

    Returns:
        For ``Lora.train_image_rows=None``: whether the model is made from its parts, and no stage-1 file and no earlier
        stage brings trained rows.
    """
    if isinstance(stage.tune, Projector):
        return recipe.model.use_im_start_end
    if isinstance(stage.tune, Full):
        return False
    if stage.tune.train_image_rows is not None:
        return stage.tune.train_image_rows
    earlier = recipe.stages[: recipe.stages.index(stage)]
    if not (recipe.model.use_im_start_end and _from_parts_alone(recipe.model)):
        return False
    return not any(isinstance(other.tune, Full) or trains_image_rows(recipe, other) for other in earlier)


def _has_new_projector(recipe: Recipe, stage: Stage) -> bool:
    """Whether the projector is still as it was drawn when a stage begins."""
    earlier = recipe.stages[: recipe.stages.index(stage)]
    trained = any(not isinstance(other.tune, Lora) or other.tune.train_projector for other in earlier)
    return _from_parts_alone(recipe.model) and not trained


def _from_parts_alone(model: ModelConfig) -> bool:
    return model.checkpoint is None and model.projector is None


def _model(model: ModelConfig) -> Iterator[Violation]:
    for name in ("language_model", "vision_tower", "checkpoint", "projector"):
        if getattr(model, name) is not None:
            yield from _filled(f"model.{name}", getattr(model, name))
    if model.checkpoint is not None:
        yield from _model_from_checkpoint(model)
    elif model.language_model is None:
        yield "model", "it is not said where the model comes from", "set checkpoint, or language_model and vision_tower"
    elif model.vision_tower is None:
        yield "model.vision_tower", "missing beside language_model", "name a CLIP tower, or use checkpoint instead"
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield "model.attention", "flash_attention_2 cannot compute in float32", "set attention to sdpa, or dtype"


def _model_from_checkpoint(model: ModelConfig) -> Iterator[Violation]:
    if model.language_model is not None:
        yield "model.checkpoint", "given together with language_model", "keep one of the two"
    standard = ModelConfig()
    for name in ("image_mode", "use_im_start_end", "vision_feature_layer"):
        if getattr(model, name) != getattr(standard, name):
            fix = "remove it" if name != "image_mode" else "use stages.N.data.image_mode"
            yield f"model.{name}", "applies only to a model made from its parts; a checkpoint brings its own", fix


def _stage_names(stages: Iterable[Stage]) -> Iterator[Violation]:
    names = [stage.name for stage in stages]
    # Folders are compared without case: macOS and Windows would put two stages into one.
    seen = Counter(name.casefold() for name in names)
    for index, name in enumerate(names):
        path = f"stages.{index}.name"
        if not _SAFE_NAME.fullmatch(name):
            yield path, f"{name!r} cannot name a results folder", "use letters, digits, '-' and '_', at most 100"
        elif name.casefold() in _TAKEN:
            yield path, f"{name!r} is what the run calls a file or folder of its own", "give the stage another name"
        elif seen[name.casefold()] > 1:
            yield path, f"{name!r} names more than one stage", "give each stage a name of its own"


def _stage(path: str, stage: Stage) -> Iterator[Violation]:
    yield from _positive(f"{path}.epochs", stage.epochs)
    for name in ("max_steps", "save_every_steps"):
        if getattr(stage, name) is not None:
            yield from _at_least(f"{path}.{name}", getattr(stage, name), 1)
    for name in ("global_batch_size", "micro_batch_size", "max_length", "keep_checkpoints"):
        yield from _at_least(f"{path}.{name}", getattr(stage, name), 1)
    if stage.micro_batch_size >= 1 and stage.global_batch_size % stage.micro_batch_size:
        yield (
            f"{path}.global_batch_size",
            f"{stage.global_batch_size} is not a multiple of micro_batch_size {stage.micro_batch_size}",
            "choose numbers that divide: global = micro x ranks x accumulation",
        )
    if stage.max_tokens is not None:
        yield from _token_budget(f"{path}.max_tokens", stage)
    yield from _data(f"{path}.data", stage.data)
    yield from _optim(f"{path}.optim", stage.optim)
    yield from _probe(f"{path}.probe", stage.probe, stage.data)
    if isinstance(stage.tune, Lora):
        yield from _lora(f"{path}.tune", stage.tune)
        if not stage.tune.train_projector and stage.optim.projector_learning_rate is not None:
            what = "given, but tune.train_projector is false"
            yield f"{path}.optim.projector_learning_rate", what, "remove the rate or train the projector"


def _token_budget(path: str, stage: Stage) -> Iterator[Violation]:
    if not stage.packing:
        yield path, "padded rows are not divided by tokens", "set packing to true, or use a smaller micro_batch_size"
    elif stage.max_tokens is not None and stage.max_tokens < stage.max_length:
        what = f"{stage.max_tokens} is less than one record may have (max_length {stage.max_length})"
        yield path, what, "give at least max_length"


def _data(path: str, data: DataConfig) -> Iterator[Violation]:
    yield from _texts(f"{path}.records", data.records)
    yield from _texts(f"{path}.images", data.images)
    if not data.records:
        yield f"{path}.records", "no file is named", "name at least one file of records"
    yield from _share(f"{path}.max_bad_share", data.max_bad_share)
    yield from _at_least(f"{path}.workers", data.workers, 0)
    if not (math.isfinite(data.holdout) and data.holdout >= 0):
        yield f"{path}.holdout", f"expected 0 or more, got {data.holdout:g}", "give a share, or a number of records"
    elif data.holdout > 1 and data.holdout != int(data.holdout):
        yield f"{path}.holdout", f"{data.holdout:g} is no whole number of records", "from 1 up, give a whole number"


def _optim(path: str, optim: OptimConfig) -> Iterator[Violation]:
    yield from _positive(f"{path}.learning_rate", optim.learning_rate)
    for name in ("projector_learning_rate", "rows_learning_rate"):
        if getattr(optim, name) is not None:
            yield from _positive(f"{path}.{name}", getattr(optim, name))
    yield from _positive(f"{path}.epsilon", optim.epsilon)
    yield from _share(f"{path}.warmup_ratio", optim.warmup_ratio)
    for name in ("weight_decay", "max_grad_norm"):
        value = getattr(optim, name)
        if not (math.isfinite(value) and value >= 0):
            yield f"{path}.{name}", f"expected 0 or more, got {value:g}", "write 0 to switch it off"
    for name in ("beta1", "beta2"):
        yield from _below_one(f"{path}.{name}", getattr(optim, name), "a common value is 0.9 or 0.999")


def _probe(path: str, probe: ProbeConfig, data: DataConfig) -> Iterator[Violation]:
    yield from _at_least(f"{path}.every_steps", probe.every_steps, 0)
    yield from _at_least(f"{path}.images", probe.images, 0)
    yield from _at_least(f"{path}.loss_records", probe.loss_records, 1)
    yield from _at_least(f"{path}.max_new_tokens", probe.max_new_tokens, 1)
    if probe.every_steps > 0 and data.holdout == 0:
        yield f"{path}.every_steps", "nothing is held out that could be looked at", "set data.holdout, e.g. 64 records"


def _lora(path: str, tune: Lora) -> Iterator[Violation]:
    yield from _at_least(f"{path}.rank", tune.rank, 1)
    yield from _positive(f"{path}.alpha", tune.alpha)
    yield from _below_one(f"{path}.dropout", tune.dropout, "a common value is 0.05")
    if tune.target == ():
        yield f"{path}.target", "no layer is named", f"name some of {', '.join(LINEAR_LAYERS)}, or use all-linear"
    for index, name in enumerate(tune.target if isinstance(tune.target, tuple) else ()):
        if name not in LINEAR_LAYERS:
            near = nearest(name, LINEAR_LAYERS)
            fix = f"did you mean '{near}'?" if near else f"choose from {', '.join(LINEAR_LAYERS)}"
            yield f"{path}.target.{index}", f"the language model has no linear layer {name!r}", fix
    if tune.bias == "lora" and tune.variant not in ("lora", "rslora"):
        what = f"{tune.variant} adapters cannot have biases"
        yield f"{path}.bias", what, "set bias to none, or variant to lora or rslora"


def _stage_on_model(path: str, stage: Stage, model: ModelConfig) -> Iterator[Violation]:
    if model.quantize is not None:
        if isinstance(stage.tune, Full):
            what = f"full fine-tuning cannot train a base stored as {model.quantize}"
            yield f"{path}.tune", what, "use tune: lora, or remove model.quantize"
        elif isinstance(stage.tune, Lora) and stage.tune.variant == "pissa":
            what = f"pissa starts from the base's own weights, which {model.quantize} has rounded"
            yield f"{path}.tune.variant", what, "use lora, rslora or dora, or remove model.quantize"
    if isinstance(stage.tune, Lora) and stage.tune.train_image_rows and not model.use_im_start_end:
        what = "the model has no <im_start>/<im_end> rows (model.use_im_start_end is false)"
        yield f"{path}.tune.train_image_rows", what, "set one of the two"
    partner = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(stage.precision)
    # float32 weights under bf16 or fp16 autocast are ordinary mixed precision; every other pair contradicts itself.
    if partner is not None and model.dtype not in ("auto", "float32", partner):
        what = f"{stage.precision} does not go with weights in {model.dtype}"
        yield f"{path}.precision", what, f"set model.dtype to {partner}, float32 or auto, or precision to auto"


def _stage_in_order(path: str, index: int, recipe: Recipe) -> Iterator[Violation]:
    """What depends on where in the run a stage stands."""
    stage = recipe.stages[index]
    if stage.optim.rows_learning_rate is not None and not trains_image_rows(recipe, stage):
        what = "given, but this stage does not train the <im_start>/<im_end> rows apart"
        yield f"{path}.optim.rows_learning_rate", what, "remove the rate, or set tune.train_image_rows with tune: lora"
    if not isinstance(stage.tune, Lora):
        return
    if not stage.tune.train_projector and _has_new_projector(recipe, stage):
        what = "the projector is newly drawn and would stay so"
        yield f"{path}.tune.train_projector", what, "train it, or give a stage-1 file as model.projector"
    if index + 1 < len(recipe.stages):
        after = f"{recipe.stages[index + 1].name!r} builds on the merged adapter"
        if recipe.model.quantize is not None:
            what = f"{after}, which a base stored as {recipe.model.quantize} would round"
            yield f"{path}.tune", what, "end the run here, merge the adapter, and begin another from the result"
        if stage.tune.bias != "none":
            yield f"{path}.tune.bias", f"{after}, and biases cannot be merged", "set bias to none"


def _filled(path: str, text: str) -> Iterator[Violation]:
    if not text.strip() or "\0" in text:
        yield path, f"expected a name, got {text!r}", "fill it in, or leave the field out where it is optional"


def _texts(path: str, texts: str | tuple[str, ...]) -> Iterator[Violation]:
    if isinstance(texts, str):
        yield from _filled(path, texts)
        return
    for index, text in enumerate(texts):
        yield from _filled(f"{path}.{index}", text)


def _at_least(path: str, value: int, least: int) -> Iterator[Violation]:
    if value < least:
        yield path, f"expected {least} or more, got {value}", f"write {least} or a larger integer"


def _positive(path: str, value: float) -> Iterator[Violation]:
    if not (math.isfinite(value) and value > 0):
        yield path, f"expected a number above 0, got {value:g}", "write a positive, finite number"


def _share(path: str, value: float) -> Iterator[Violation]:
    if not 0 <= value <= 1:
        yield path, f"expected a share from 0 to 1, got {value:g}", "write for example 0.03 for 3 %"


def _below_one(path: str, value: float, fix: str) -> Iterator[Violation]:
    if not 0 <= value < 1:
        yield path, f"expected a number from 0 to below 1, got {value:g}", fix
