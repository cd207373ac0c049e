"""What adapters are merged into: a LLaVAR on disk, or the plain language model and tower that one was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llavar_peft.constants import MODEL_TYPE
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.weights.adapter.adapter_files import BASE_FILE
from llavar_peft.weights.adapter.lora_updates import Adapter, Replacement, Rows
from llavar_peft.weights.delta.released_layout import ReleasedView, flatten_config, read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_table import TensorEntry, read_tensor_table
from llavar_peft.weights.projector_file import TRAINED_ROWS, read_projector

Quantized = Literal["nf4", "int8"]
_GROWING = (tensor_names.EMBEDDINGS, tensor_names.HEAD)
_PROJECTOR = (tensor_names.PROJECTOR_WEIGHT, tensor_names.PROJECTOR_BIAS)


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """What an adapter says of its base, as its run was configured.

    Attributes:
        vision_tower: Where the tower was taken from, where that is not the base itself.
        projector: The stage-1 file that was laid over the base.
        quantize: ``"nf4"``, ``"int8"``, or None.
        dtype: Of the weights before they were quantized.
    """

    vision_tower: str | None = None
    projector: str | None = None
    quantize: Quantized | None = None
    dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class MergeBase:
    """The tensors before the merge, by the names that the result has.

    Attributes:
        table: Those that are on disk. They may have fewer rows than the result: LLaVA adds tokens to LLaMA's.
        shapes: Of all tensors of the result.
        ours: Our name of one of the result's tensors.
        config: The result's ``config.json``.
        companions: Folders of what belongs beside the weights; a later one's files count.
        overlay: A stage-1 projector, by our names.
    """

    table: Mapping[str, TensorEntry]
    shapes: Mapping[str, tuple[int, ...]]
    ours: Callable[[str], str | None]
    config: Mapping[str, Any]
    companions: tuple[Path, ...]
    overlay: Mapping[str, Replacement | Rows] = field(default_factory=dict)

    def dtype(self, name: str) -> str:
        """Torch's name of a tensor's dtype; the embeddings' for a tensor that is not on disk."""
        if name in self.table:
            return self.table[name].dtype
        return next(entry.dtype for key, entry in self.table.items() if self.ours(key) == tensor_names.EMBEDDINGS)


def read_base_settings(adapter: Path) -> BaseSettings:
    """Read ``base.json`` beside an adapter.

    Args:
        adapter: Its folder.

    Returns:
        Its settings; all unknown for an adapter without the file.

    Raises:
        ConfigError: The file is not readable.
    """
    path = adapter / BASE_FILE
    if not path.is_file():
        return BaseSettings()
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if known.get("quantize") not in (None, "nf4", "int8"):
            raise ValueError(f"quantize: {known['quantize']!r}")
        return BaseSettings(
            vision_tower=known.get("vision_tower"),
            projector=known.get("projector"),
            quantize=known.get("quantize"),
            dtype=known.get("dtype") or "auto",
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError.at(str(path), f"not readable as a base's settings ({error})", "fetch it again") from error


def open_merge_base(
    folder: Path, adapters: Sequence[Adapter], *, vision_tower: str | Path | None, projector: str | Path | None
) -> MergeBase:
    """Open a base for a merge that is to give a whole model.

    Args:
        folder: A checkpoint of ours; one in the released layout; or a plain LLaMA or Vicuna, whose tower, projector and
            new rows then come from what the adapters say.
        adapters: To be merged, at least one.
        vision_tower: CLIP's folder, for a plain language model; None is where the first adapter's run had it.
        projector: A stage-1 file laid over the base; None is the one that the first adapter's run had.

    Returns:
        The base; a plain language model under our names, with the tower.

    Raises:
        ConfigError: Another kind of model, or a tower or projector that is not there.
        WeightsError: Weights that are missing or cut off.
    """
    settings = read_base_settings(adapters[0].folder)
    config = read_model_config(folder)
    if config.get("model_type") != "llama":
        ours = _same if config.get("model_type") == MODEL_TYPE else tensor_names.from_released
        table = {name: entry for name, entry in read_tensor_table(folder).items() if ours(name) is not None}
        shapes = {name: entry.shape for name, entry in table.items()}
        rows = next((shape[0] for name, shape in shapes.items() if ours(name) == tensor_names.EMBEDDINGS), 0)
        overlay = _overlay(projector or settings.projector, adapters[0].folder, rows)
        return MergeBase(table, shapes, ours, config, (folder,), overlay)
    grown = _grown(folder, adapters, projector or settings.projector)
    tower = Path(vision_tower or settings.vision_tower or "")
    if not (tower / "config.json").is_file():
        where = str(adapters[0].folder / BASE_FILE) if vision_tower is None else "--vision-tower"
        raise ConfigError.at(where, f"no vision tower there (got {str(tower)!r})", "give CLIP's folder as vision tower")
    entries = {new: entry for name, entry in read_tensor_table(tower).items() if (new := tensor_names.from_clip(name))}
    return MergeBase(
        {**grown.table, **entries},
        {**grown.shapes, **{name: entry.shape for name, entry in entries.items()}},
        _same,
        grown.config,
        (adapters[0].folder,),
        grown.overlay,
    )


def released_merge_base(view: ReleasedView, adapters: Sequence[Adapter]) -> MergeBase:
    """A model seen as the released layout has it, for a merge that is to go into a delta.

    Args:
        view: Of a checkpoint, or of a plain LLaMA or Vicuna.
        adapters: To be merged; may be none.

    Returns:
        The base by released names, without a tower.

    Raises:
        ConfigError: An adapter's projector file is not there.
        WeightsError: A plain language model and no projector.
    """
    overlay_file = read_base_settings(adapters[0].folder).projector if adapters else None
    if not adapters or view.config.get("model_type") != "llama":
        shapes = {name: entry.shape for name, entry in view.table.items()}
        rows = shapes.get(tensor_names.RELEASED_EMBEDDINGS, (0,))[0]
        overlay = _overlay(overlay_file, adapters[0].folder, rows) if adapters else {}
        return MergeBase(view.table, shapes, tensor_names.from_released, view.config, (view.folder,), overlay)
    grown = _grown(view.folder, adapters, overlay_file)
    return MergeBase(
        {released: entry for name, entry in grown.table.items() if (released := tensor_names.to_released(name))},
        {released: shape for name, shape in grown.shapes.items() if (released := tensor_names.to_released(name))},
        tensor_names.from_released,
        flatten_config(grown.config),
        (view.folder, adapters[0].folder),
        grown.overlay,
    )


def _grown(folder: Path, adapters: Sequence[Adapter], projector: str | Path | None) -> MergeBase:
    """A plain language model with what LLaVA adds to it, by our names and without a tower."""
    first = adapters[0].folder
    config = read_model_config(first)
    if config.get("model_type") != MODEL_TYPE:
        raise ConfigError.at(
            f"{first / 'config.json'}:model_type",
            f"does not say what was made of the language model (got {config.get('model_type')!r})",
            "give the whole LLaVAR that the adapter was trained on as base",
        )
    table = {
        ours: entry for name, entry in read_tensor_table(folder).items() if (ours := tensor_names.from_released(name))
    }
    if tensor_names.HEAD not in table and tensor_names.EMBEDDINGS in table:  # tied in the file; ours never are
        table[tensor_names.HEAD] = table[tensor_names.EMBEDDINGS]
    rows = int(config["text_config"]["vocab_size"])
    overlay = _overlay(projector, first, rows)
    shapes = {name: (rows, *entry.shape[1:]) if name in _GROWING else entry.shape for name, entry in table.items()}
    for name in _PROJECTOR:
        found = next((one.updates[name] for one in adapters if name in one.updates), overlay.get(name))
        if not isinstance(found, Replacement):
            raise WeightsError.at(
                str(first), f"a plain language model has no {name}, and the adapter neither", "give the projector file"
            )
        shapes[name] = tuple(found.value.shape)
    return MergeBase(table, shapes, _same, config, (first,), overlay)


def _overlay(projector: str | Path | None, adapter: Path, rows: int) -> dict[str, Replacement | Rows]:
    """What a stage-1 file replaces in a model with this many embeddings."""
    if projector is None:
        return {}
    import torch

    if not Path(projector).exists():
        raise ConfigError.at(
            str(adapter / BASE_FILE),
            f"the projector that its run began with is not there (got {str(projector)!r})",
            "say where it is (--projector)",
        )
    stored = read_projector(projector)
    if not set(_PROJECTOR) <= set(stored):
        raise WeightsError.at(str(projector), "holds no projector", "give the mm_projector.bin that stage 1 wrote")
    updates: dict[str, Replacement | Rows] = {name: Replacement(stored[name].float()) for name in _PROJECTOR}
    if tensor_names.EMBEDDINGS in stored:
        last = torch.arange(rows - TRAINED_ROWS, rows)
        updates[tensor_names.EMBEDDINGS] = Rows(last, stored[tensor_names.EMBEDDINGS][-TRAINED_ROWS:].float())
    return updates


def _same(name: str) -> str:
    return name
