"""The rules of a recipe that involve several fields: settings that are each valid but contradict each other.

Constraints of single fields are declared in ``schema``. ``validate`` reports both in one error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from llavar_peft.constants import METRICS_FILE, RESOLVED_RECIPE_FILE, VERSIONS_FILE
from llavar_peft.recipe.resolution import Tiles
from llavar_peft.recipe.schema import ColumnNames, DataConfig, Full, Lora, ModelConfig, Projector, Recipe, Stage, Tune

Violation = tuple[str, str, str]
"""Dotted path, what is wrong, fix."""

# Files and folders that a run writes to its folder, next to the stages' folders.
_RESERVED = frozenset(
    {METRICS_FILE, RESOLVED_RECIPE_FILE, VERSIONS_FILE, "adapter", "index.html", "model", "stages.json"}
)
_MOST_REPEATS = 1000  # of a record in an epoch
_COMPUTE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def find_violations(recipe: Recipe) -> Iterator[Violation]:
    """Yield one ``(dotted path, what is wrong, fix)`` for each rule that a recipe breaks.

    Args:
        recipe: The recipe; each field has its declared type and satisfies its constraints.
    """
    yield from _check_model(recipe.model)
    yield from _check_stage_names(recipe.stages)
    for index, stage in enumerate(recipe.stages):
        path = f"stages.{index}"
        yield from _check_stage(path, stage)
        yield from _check_stage_against_model(path, stage, recipe.model)
        yield from _check_stage_in_order(path, index, recipe)


def trains_image_rows(recipe: Recipe, stage: Stage) -> bool:
    """Return whether a stage trains the ``<im_start>`` and ``<im_end>`` embeddings separately from all others.

    ``Lora.train_image_rows=None`` trains them if the model is built from its parts and neither a stage-1 file nor an
    earlier stage provides trained ones.

    Args:
        recipe: The run.
        stage: One of its stages.
    """
    if isinstance(stage.tune, Projector):
        return recipe.model.use_im_start_end
    if isinstance(stage.tune, Full):
        return False
    if stage.tune.train_image_rows is not None:
        return stage.tune.train_image_rows
    earlier = recipe.stages[: recipe.stages.index(stage)]
    if not (recipe.model.use_im_start_end and _is_untrained(recipe.model)):
        return False
    return not any(isinstance(other.tune, Full) or trains_image_rows(recipe, other) for other in earlier)


def tunes_tower(tune: Tune) -> bool:
    """Return whether a stage changes the vision tower, as a whole or by adapters."""
    if isinstance(tune, Full):
        return tune.train_tower
    return isinstance(tune, Lora) and tune.tower_rank is not None


def _trains_projector_before(recipe: Recipe, stage: Stage) -> bool:
    earlier = recipe.stages[: recipe.stages.index(stage)]
    return any(not isinstance(other.tune, Lora) or other.tune.train_projector for other in earlier)


def _is_untrained(model: ModelConfig) -> bool:
    return model.checkpoint is None and model.projector is None


def _check_model(model: ModelConfig) -> Iterator[Violation]:
    if model.checkpoint is not None:
        if model.language_model is not None:
            yield "model.checkpoint", "set together with language_model", "keep one of the two"
        defaults = ModelConfig()
        for name in ("image_mode", "projector_type", "template", "use_im_start_end", "vision_feature_layer"):
            if getattr(model, name) != getattr(defaults, name):
                fix = "remove it" if name != "image_mode" else "use stages.N.data.image_mode"
                yield f"model.{name}", "applies only to a model built from parts; a checkpoint has its own value", fix
    elif model.language_model is None:
        yield "model", "the source of the model is missing", "set checkpoint, or language_model and vision_tower"
    elif model.vision_tower is None:
        yield "model.vision_tower", "missing; language_model needs it", "name a CLIP tower, or use checkpoint instead"
    if model.resolution is not None and model.image_mode == "keep":
        yield "model.image_mode", "keep has no images of one size, which model.resolution needs", "set it to pad"
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield "model.attention", "flash_attention_2 does not support float32", "set attention to sdpa, or change dtype"


def _check_stage_names(stages: Iterable[Stage]) -> Iterator[Violation]:
    names = [stage.name for stage in stages]
    # File systems of macOS and Windows ignore case and would mix the results of two stages.
    count = Counter(name.casefold() for name in names)
    for index, name in enumerate(names):
        path = f"stages.{index}.name"
        if name.casefold() in _RESERVED:
            yield path, f"{name!r} is the name of a file or folder that every run writes", "rename the stage"
        elif count[name.casefold()] > 1:
            yield path, f"{name!r} is the name of more than one stage", "give each stage a unique name"


def _check_sources(path: str, data: DataConfig) -> Iterator[Violation]:
    if data.records is None and not data.sources:
        yield f"{path}.records", "missing", "add a line 'records: ...'"
    elif data.records is not None and data.sources:
        yield f"{path}.sources", "set together with records", "keep one of the two"
    for name, unset in (("split", None), ("config", None), ("streaming", False), ("columns", ColumnNames())):
        if data.sources and getattr(data, name) != unset:
            yield f"{path}.{name}", "set together with sources", "set it in each source"
    for number, source in enumerate(data.sources):
        if source.weight > _MOST_REPEATS:
            what = f"{source.weight:g} would take each record {source.weight:g} times in an epoch"
            yield f"{path}.sources.{number}.weight", what, f"use at most {_MOST_REPEATS}, and smaller weights elsewhere"


def _check_stage(path: str, stage: Stage) -> Iterator[Violation]:
    yield from _check_sources(f"{path}.data", stage.data)
    if stage.global_batch_size % stage.micro_batch_size:
        what = f"{stage.global_batch_size} is not a multiple of micro_batch_size {stage.micro_batch_size}"
        yield f"{path}.global_batch_size", what, "use global_batch_size = micro_batch_size x ranks x accumulation steps"
    if stage.max_tokens is not None and not stage.packing:
        fix = "set packing to true, or use a smaller micro_batch_size"
        yield f"{path}.max_tokens", "requires packing; padded rows are not divided by tokens", fix
    elif stage.max_tokens is not None and stage.max_tokens < stage.max_length:
        what = f"{stage.max_tokens} is less than max_length {stage.max_length}, the tokens of one record"
        yield f"{path}.max_tokens", what, "use max_length or more"
    if stage.probe.every_steps > 0 and stage.data.holdout == 0:
        yield f"{path}.probe.every_steps", "requires held-out records", "set data.holdout, for example to 64"
    rate = None if isinstance(stage.tune, Projector) else stage.tune.tower_learning_rate
    if rate is not None and not tunes_tower(stage.tune):
        setting = "train_tower: true" if isinstance(stage.tune, Full) else "tower_rank"
        what = "set, but the vision tower is not trained"
        yield f"{path}.tune.tower_learning_rate", what, f"remove the rate, or set {setting}"
    if not isinstance(stage.tune, Lora):
        return
    if stage.tune.bias == "lora" and stage.tune.variant not in ("lora", "rslora"):
        what = f"{stage.tune.variant} does not support biases"
        yield f"{path}.tune.bias", what, "set bias to none, or variant to lora or rslora"
    if not stage.tune.train_projector and stage.optim.projector_learning_rate is not None:
        what = "set, but tune.train_projector is false"
        yield f"{path}.optim.projector_learning_rate", what, "remove the rate, or train the projector"


def _check_stage_against_model(path: str, stage: Stage, model: ModelConfig) -> Iterator[Violation]:
    if model.resolution is not None and stage.data.image_mode == "keep":
        what = "keep has no images of one size, which model.resolution needs"
        yield f"{path}.data.image_mode", what, "remove it, or remove model.resolution"
    if model.quantize is not None:
        if isinstance(stage.tune, Full):
            what = f"full fine-tuning cannot train a base stored as {model.quantize}"
            yield f"{path}.tune", what, "use tune: lora, or remove model.quantize"
        elif isinstance(stage.tune, Lora) and stage.tune.variant == "pissa":
            what = f"pissa is initialized from the base's exact weights, which {model.quantize} rounds"
            yield f"{path}.tune.variant", what, "use lora, rslora or dora, or remove model.quantize"
    if isinstance(stage.tune, Lora) and stage.tune.train_image_rows and not model.use_im_start_end:
        what = "the model has no <im_start> and <im_end> embeddings (model.use_im_start_end is false)"
        yield f"{path}.tune.train_image_rows", what, "change one of the two"
    # float32 weights under bf16 or fp16 autocast are ordinary mixed precision; every other pair contradicts itself.
    dtype = _COMPUTE_DTYPES.get(stage.precision)
    if dtype is not None and model.dtype not in ("auto", "float32", dtype):
        what = f"{stage.precision} cannot be used with weights in {model.dtype}"
        yield f"{path}.precision", what, f"set model.dtype to {dtype}, float32 or auto, or precision to auto"


def _check_stage_in_order(path: str, index: int, recipe: Recipe) -> Iterator[Violation]:
    """Yield the violations that depend on the stages before and after."""
    stage = recipe.stages[index]
    if stage.optim.rows_learning_rate is not None and not trains_image_rows(recipe, stage):
        what = "set, but this stage does not train the <im_start> and <im_end> embeddings separately"
        yield f"{path}.optim.rows_learning_rate", what, "remove the rate, or set tune.train_image_rows with tune: lora"
    if not isinstance(stage.tune, Lora):
        return
    if not stage.tune.train_projector and not _trains_projector_before(recipe, stage):
        if recipe.model.language_model is not None and _is_untrained(recipe.model):
            what = "the projector is untrained and would not be trained"
            yield f"{path}.tune.train_projector", what, "train it, or set model.projector to a stage-1 file"
        elif isinstance(recipe.model.resolution, Tiles) and recipe.model.projector is None:
            what = "false, and the embedding that tiles add to the projector would not be trained"
            fix = "set it to true; for a checkpoint that reads tiles already, remove model.resolution"
            yield f"{path}.tune.train_projector", what, fix
    if index + 1 < len(recipe.stages):
        following = f"{recipe.stages[index + 1].name!r} starts from the merged adapter"
        if recipe.model.quantize is not None:
            what = f"{following}, which a base stored as {recipe.model.quantize} would round"
            yield f"{path}.tune", what, "end the run here, merge the adapter, and start another run from the result"
        if stage.tune.bias != "none":
            yield f"{path}.tune.bias", f"{following}, and biases cannot be merged", "set bias to none"
