"""The base of a merge: the tensors that adapters are added to, under the names that they get in the result.

``open_merge_base`` opens a LLaVAR, or the plain language model and tower that one is made from, for a merge into a
whole model; ``released_merge_base`` one in the released layout, for a merge into a delta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llavar_peft.constants import MODEL_TYPE, TUNED_TOWER
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.weights.adapter.adapter_files import BASE_FILE, missing_projector, read_base_settings
from llavar_peft.weights.adapter.adapter_layouts import conversion_of, is_llava_lora
from llavar_peft.weights.adapter.lora_updates import Adapter, Replacement, Rows
from llavar_peft.weights.delta.flat_settings import FLAT_TRAINED_TOWER, flatten_config, stated_template
from llavar_peft.weights.delta.released_layout import (
    ReleasedView,
    check_not_delta,
    is_language_model,
    read_model_config,
)
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.hub_folders import find_folder
from llavar_peft.weights.io.projector_file import TRAINED_ROWS, read_projector
from llavar_peft.weights.io.quantized_weights import check_unquantized
from llavar_peft.weights.io.stated_resolution import (
    RESOLUTION,
    find_resolution_fault,
    flat_resolution,
    resolution_kind,
    resolution_of_adapter,
    stated_resolution,
)
from llavar_peft.weights.io.tensor_table import TensorEntry, dtype_name, read_tensor_table

if TYPE_CHECKING:
    from torch import Tensor

_STREAMED_TOWERS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
"""Towers whose tensors have the same names in their files and in our model, apart from a prefix."""
ReadTower: TypeAlias = "Callable[[Path], Mapping[str, Tensor]]"
"""Returns the tensors of a tower by our names, in memory."""
ReadLanguage: TypeAlias = "Callable[[Path], Mapping[str, Tensor] | None]"
"""Returns the tensors of a language model by our names; None where its file has them as LLaMA's has, to be streamed."""
_RELEASED = (tensor_names.from_released, tensor_names.from_released_with_tower)
"""From names of the released layout to ours."""
_FIX_PROJECTOR = "give the mm_projector.bin that stage 1 wrote"


@dataclass(frozen=True, slots=True)
class MergeBase:
    """The tensors before the merge, by their names in the result.

    Attributes:
        table: The tensors on disk. They may have fewer rows than the result: LLaVA adds tokens to LLaMA's.
        shapes: Shapes of all tensors of the result.
        ours: Returns our name of one of the result's tensors.
        config: The result's ``config.json``.
        companions: Folders with other files of the model; files of a later folder replace those of an earlier one.
        overlay: A stage-1 projector, by our names.
    """

    table: Mapping[str, TensorEntry]
    shapes: Mapping[str, tuple[int, ...]]
    ours: Callable[[str], str | None]
    config: Mapping[str, Any]
    companions: tuple[Path, ...]
    overlay: Mapping[str, Replacement | Rows] = field(default_factory=dict)

    def dtype(self, name: str) -> str:
        """Return torch's name of a tensor's dtype; that of the embeddings for a tensor that is not on disk."""
        if name in self.table:
            return self.table[name].dtype
        names = {self.ours(key) or key: entry for key, entry in self.table.items()}
        return names[tensor_names.find_embeddings(names)].dtype


def open_merge_base(
    folder: Path,
    adapters: Sequence[Adapter],
    *,
    vision_tower: str | Path | None,
    projector: str | Path | None,
    read_tower: ReadTower | None = None,
    read_language: ReadLanguage | None = None,
) -> MergeBase:
    """Open a base for a merge into a whole model.

    Args:
        folder: A checkpoint of ours, of stock transformers, or in the released layout; or a plain LLaMA or Vicuna, to
            which tower, projector and new rows are then added as in the training of the first adapter.
        adapters: The adapters to merge, at least one.
        vision_tower: CLIP's folder, for a plain language model; None is that of the first adapter's run.
        projector: A stage-1 file that is applied to the base; None is that of the first adapter's run.
        read_tower: Reads towers whose tensors have other names in their files than in our model.
        read_language: Reads language models whose tensors have other names or forms in their files.

    Returns:
        The base; a plain language model by our names, with the tower.

    Raises:
        ConfigError: Another kind of model, or a missing tower or projector.
        WeightsError: Weights are missing or truncated.
    """
    settings = read_base_settings(adapters[0].folder)
    config = read_model_config(folder)
    check_unquantized(config, folder, "a merge")
    projector = projector or settings.projector
    if not is_language_model(config):
        return _open_llavar(folder, config, adapters, projector)
    converted = None if read_language is None else read_language(folder)
    extended = _extend_language_model(folder, adapters, projector, converted)
    tower = find_folder(vision_tower or settings.vision_tower or "", "vision_tower")
    if not (tower / "config.json").is_file():
        where = str(adapters[0].folder / BASE_FILE) if vision_tower is None else "--vision-tower"
        what = f"no vision tower found (got {str(tower)!r}, expected a folder with config.json)"
        raise ConfigError.at(where, what, "give the tower's folder with --vision-tower")
    tower_table = _tower_entries(tower, read_tower)
    return MergeBase(
        {**extended.table, **tower_table},
        {**extended.shapes, **{name: entry.shape for name, entry in tower_table.items()}},
        _same,
        extended.config,
        (adapters[0].folder,),
        extended.overlay,
    )


def _open_llavar(
    folder: Path, config: Mapping[str, Any], adapters: Sequence[Adapter], projector: str | Path | None
) -> MergeBase:
    """Open a LLaVAR in any layout as a base; its tensors keep the names of that layout."""
    to_ours = _choose_names(config)
    if to_ours is tensor_names.from_released:
        fix = "merge into a base that `llavar-peft convert BASE OUT --to llavar --vision-tower TOWER` writes"
        _check_frozen_tower(adapters, fix)
    table = {name: entry for name, entry in read_tensor_table(folder).items() if to_ours(name) is not None}
    by_our_name = {to_ours(name) or name: entry for name, entry in table.items()}
    check_not_delta(by_our_name.get(tensor_names.FINAL_NORM), folder, config)
    embeddings = by_our_name.get(tensor_names.find_embeddings(by_our_name))
    overlay = _read_overlay(projector, adapters[0].folder, 0 if embeddings is None else embeddings.shape[0])
    if any(adapter.tunes_tower for adapter in adapters) and to_ours not in _RELEASED:
        config = {**config, TUNED_TOWER: True}
    shapes = {name: entry.shape for name, entry in table.items()}
    return _with_resolution(MergeBase(table, shapes, to_ours, config, (folder,), overlay), adapters)


def _choose_names(config: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Return the function from the names in a model's layout to ours."""
    if config.get("model_type") == MODEL_TYPE:
        return _same
    if "text_config" in config:
        return tensor_names.from_stock
    # LLaVA 1.6's own tower is among its weights, and has to be among those of the result.
    return tensor_names.from_released_with_tower if config.get(FLAT_TRAINED_TOWER) else tensor_names.from_released


def _with_resolution(base: MergeBase, adapters: Sequence[Adapter]) -> MergeBase:
    """Return a base with the resolution that its adapters were trained with, and a place for the weights of that.

    Raises:
        ConfigError: The base, or its layout, has another resolution.
        WeightsError: The base has no such weights, and neither have the adapters.
    """
    config, kind = dict(base.config), resolution_kind(base.config)
    checks = [find_resolution_fault(adapter.folder, kind) for adapter in adapters]
    faults = [fault for fault in checks if fault is not None]
    if faults:
        raise ConfigError(str(faults[0]), faults)
    stated = [(adapter.folder, resolution_of_adapter(adapter.folder)) for adapter in adapters]
    resolutions = [(folder, resolution) for folder, resolution in stated if resolution is not None]
    if not resolutions:
        return base
    folder, resolution = resolutions[-1]
    newline_name = tensor_names.NEWLINE
    if base.ours is tensor_names.from_stock:
        base_resolution = stated_resolution(config) or {}
        if any(resolution.get(key) != base_resolution.get(key) for key in ("type", "grid", "pool")):
            what = (
                f"the base's layout, that of stock transformers, has not the resolution that {folder} was trained with"
            )
            fix = "merge into a base that `llavar-peft convert BASE OUT --to llavar` writes"
            raise ConfigError.at(str(base.companions[0]), what, fix)
    elif base.ours in _RELEASED:
        side = int((read_model_config(folder).get("vision_config") or {}).get("image_size") or 0)
        config.update(flat_resolution(resolution, side))
        newline_name = tensor_names.RELEASED_NEWLINE
    else:
        config[RESOLUTION] = dict(resolution)
    shapes = dict(base.shapes)
    if resolution["type"] == "tiles" and tensor_names.NEWLINE not in map(base.ours, shapes):
        shapes[newline_name] = _shape_in_full(tensor_names.NEWLINE, adapters, base.overlay)
    shapes.update(_cross_attention_shapes(adapters, base.overlay))
    return replace(base, config=config, shapes=shapes)


def _shape_in_full(
    name: str, adapters: Sequence[Adapter], overlay: Mapping[str, Replacement | Rows]
) -> tuple[int, ...]:
    """Return the shape of a tensor that an adapter or a projector file contains as a whole, by our name.

    Raises:
        WeightsError: None of them does.
    """
    update = next((adapter.updates[name] for adapter in adapters if name in adapter.updates), overlay.get(name))
    if not isinstance(update, Replacement):
        what = f"no {name}, neither in the adapter nor in its base"
        raise WeightsError.at(str(adapters[0].folder), what, _FIX_PROJECTOR)
    return tuple(update.value.shape)


def _check_frozen_tower(adapters: Sequence[Adapter], fix: str) -> None:
    """Reject adapters on the vision tower for a model in the released layout, which contains no tower."""
    for adapter in adapters:
        if adapter.tunes_tower:
            what = "the adapter changes the vision tower, and the result's layout, the released one, contains none"
            raise ConfigError.at(str(adapter.folder), what, fix)


def _tower_entries(tower: Path, read_tower: ReadTower | None) -> dict[str, TensorEntry]:
    """Return a tower's tensors by our names: on disk for CLIP and SigLIP, in memory for others."""
    stored = read_tensor_table(tower)
    if read_tower is None or read_model_config(tower).get("model_type") in _STREAMED_TOWERS:
        return {
            our_name: entry for name, entry in stored.items() if (our_name := tensor_names.from_clip(name)) is not None
        }
    return _in_memory(read_tower(tower), next(iter(stored.values())).path)


def _in_memory(tensors: Mapping[str, Tensor], file: Path) -> dict[str, TensorEntry]:
    """Return tensors in memory as entries of a table; ``file`` is where they come from, for messages."""
    return {
        name: TensorEntry(name, tuple(tensor.shape), dtype_name(tensor), file, 0, data=tensor)
        for name, tensor in tensors.items()
    }


def released_merge_base(view: ReleasedView, adapters: Sequence[Adapter]) -> MergeBase:
    """Return a model in the released layout as the base of a merge into a delta.

    Args:
        view: A checkpoint, or a plain LLaMA or Vicuna.
        adapters: The adapters to merge; may be empty.

    Returns:
        The base by released names, without a tower.

    Raises:
        ConfigError: The projector file of an adapter is missing, or an adapter changes the vision tower.
        WeightsError: A plain language model without a projector.
    """
    _check_frozen_tower(adapters, "write the whole model with `llavar-peft merge`, and publish that")
    projector = read_base_settings(adapters[0].folder).projector if adapters else None
    if not adapters or not is_language_model(view.config):
        shapes = {name: entry.shape for name, entry in view.table.items()}
        rows = shapes.get(tensor_names.RELEASED_EMBEDDINGS, (0,))[0]
        overlay = _read_overlay(projector, adapters[0].folder, rows) if adapters else {}
        base = MergeBase(view.table, shapes, tensor_names.from_released, view.config, (view.folder,), overlay)
        return _with_resolution(base, adapters) if adapters else base
    extended = _extend_language_model(view.folder, adapters, projector)
    return MergeBase(
        {released: entry for name, entry in extended.table.items() if (released := tensor_names.to_released(name))},
        {released: shape for name, shape in extended.shapes.items() if (released := tensor_names.to_released(name))},
        tensor_names.from_released,
        flatten_config(extended.config, template=stated_template(adapters[0].folder, extended.config)),
        (view.folder, adapters[0].folder),
        extended.overlay,
    )


def _extend_language_model(
    folder: Path,
    adapters: Sequence[Adapter],
    projector: str | Path | None,
    converted: Mapping[str, Tensor] | None = None,
) -> MergeBase:
    """Return a plain language model with what LLaVA adds to it, by our names and without a tower."""
    first = adapters[0].folder
    config = read_model_config(first)
    if config.get("model_type") != MODEL_TYPE:
        raise ConfigError.at(
            f"{first / 'config.json'}:model_type",
            f"not the configuration of a LLaVAR (got {config.get('model_type')!r}, expected {MODEL_TYPE!r})",
            conversion_of(first, base=folder)
            if is_llava_lora(first)
            else "give the whole LLaVAR that the adapter was trained on as base",
        )
    stored = read_tensor_table(folder)
    table = {
        our_name: entry for name, entry in stored.items() if (our_name := tensor_names.from_released(name)) is not None
    }
    if converted is not None:
        table = _in_memory(converted, next(iter(stored.values())).path)
    embeddings = tensor_names.find_embeddings(table)
    check_not_delta(table.get(tensor_names.FINAL_NORM), folder, config)
    if config.get("tie_word_embeddings"):
        table.pop(tensor_names.HEAD, None)
    elif tensor_names.HEAD not in table and embeddings in table:  # tied in the file only
        table[tensor_names.HEAD] = table[embeddings]
    rows = int(config["text_config"]["vocab_size"])
    overlay = _read_overlay(projector, first, rows)
    shapes = {name: entry.shape for name, entry in table.items()}
    for name in (embeddings, tensor_names.HEAD, tensor_names.HEAD_BIAS):
        if name in shapes:
            shapes[name] = (rows, *shapes[name][1:])
    has_tiles = resolution_kind(config) == "tiles"
    for name in tensor_names.projector_names(config.get("projector_hidden_act"), tiles=has_tiles):
        shapes[name] = _shape_in_full(name, adapters, overlay)
    shapes.update(_cross_attention_shapes(adapters, overlay))
    return MergeBase(table, shapes, _same, config, (first,), overlay)


def _cross_attention_shapes(
    adapters: Sequence[Adapter], overlay: Mapping[str, Replacement | Rows]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the cross-attention that adapters contain; its names are the same in all layouts."""
    updates: dict[str, Any] = {**overlay}
    for adapter in adapters:
        updates.update(adapter.updates)
    return {
        name: tuple(update.value.shape)
        for name, update in updates.items()
        if name.startswith(tensor_names.CROSS_ATTENTION)
    }


def _read_overlay(projector: str | Path | None, adapter: Path, rows: int) -> dict[str, Replacement | Rows]:
    """Return what a stage-1 file replaces in a model with this number of embedding rows."""
    if projector is None:
        return {}
    import torch

    if fault := missing_projector(projector, adapter):
        raise ConfigError(str(fault), (fault,))
    stored = read_projector(projector)
    names = [name for name in stored if name.startswith(tensor_names.TRAINED_WITH_PROJECTOR)]
    if not names:
        raise WeightsError.at(str(projector), "no projector in this file", _FIX_PROJECTOR)
    updates: dict[str, Replacement | Rows] = {name: Replacement(stored[name].float()) for name in names}
    if tensor_names.EMBEDDINGS in stored:
        last = torch.arange(rows - TRAINED_ROWS, rows)
        updates[tensor_names.EMBEDDINGS] = Rows(last, stored[tensor_names.EMBEDDINGS][-TRAINED_ROWS:].float())
    return updates


def _same(name: str) -> str:
    """Return a name of our layout, which needs no change."""
    return name
