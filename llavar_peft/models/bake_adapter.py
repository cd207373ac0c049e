"""``bake_adapter``: split an adapter into a base that contains what is no low-rank update, and a pure LoRA for it.

The projector, trained rows of the embeddings, and updates of the vision tower are written into a copy of the base, as a
merge would write them. What is left are low-rank updates of the language model, which vLLM loads with that base, also
beside other adapters. Base and LoRA together are the model that base and adapter were.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llavar_peft.atomic_files import write_json
from llavar_peft.constants import MODEL_TYPE, RESOLVED_RECIPE_FILE, TUNED_TOWER
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.models.language_model_loading import read_converted
from llavar_peft.models.merge_adapter import BOUND, write_chat_template
from llavar_peft.models.merge_logits_gap import LogitsGap, logits_gap, probe_ids, probe_logits, read_config
from llavar_peft.models.probe_weights import UnmergedWeights
from llavar_peft.models.tower_loading import read_tower_tensors
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.types import ReadableRepr, expand_home
from llavar_peft.weights.adapter.adapter_files import ADAPTER_WEIGHTS, BASE_FILE, PREFIX, read_base_settings
from llavar_peft.weights.adapter.adapter_layouts import open_adapter
from llavar_peft.weights.adapter.adapter_settings import peft_settings
from llavar_peft.weights.adapter.lora_updates import Adapter, LowRank
from llavar_peft.weights.delta.released_layout import read_model_config, read_tower_table, view_as_released
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.companion_files import CHAT_TEMPLATE_FILE, copy_companion, find_companions
from llavar_peft.weights.io.hub_folders import find_folder
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE
from llavar_peft.weights.io.tensor_blocks import read_tensor, write_checksums
from llavar_peft.weights.io.weights_card import adapter_name, portable_name, write_weights_card
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE, take_fingerprint
from llavar_peft.weights.io.write_weights import Progress
from llavar_peft.weights.merge.merge_plan import MergePlan, open_merge, write_merged
from llavar_peft.weights.merge.merge_stream import MergedTensors

if TYPE_CHECKING:
    from torch import Tensor

    from llavar_peft.recipe.schema import Dtype

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
"""Folder of the LoRA in that of the base."""
_LORA_ENDS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True, repr=False)
class BakeReport(ReadableRepr):
    """What was written.

    Attributes:
        out: The folder of the base.
        adapter: The folder of the LoRA, in it.
        baked: Our names of the tensors of the base that the adapter changed.
        updates: Number of low-rank updates in the LoRA.
        tensors: Number of tensors of the base.
        nbytes: Size of these in bytes.
        seconds: Time to write them.
        gap: The difference of the logits of base and LoRA from those of the given base and adapter; None without a
            probe.
    """

    out: Path
    adapter: Path
    baked: tuple[str, ...]
    updates: int
    tensors: int
    nbytes: int
    seconds: float
    gap: LogitsGap | None


def bake_adapter(  # noqa: PLR0913 - the options of the merge that apply
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    vision_tower: str | Path | None = None,
    projector: str | Path | None = None,
    shard_size: int = RELEASED_SHARD_SIZE,
    probe: bool = True,
    bound: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> BakeReport:
    """Write a base that contains an adapter's projector, rows and updates of the tower, and the rest as a pure LoRA.

    The base is written from disk to disk, as by ``merge_adapter``, in its own layout, with the LoRA in its folder
    ``adapter``. Both appear together or not at all. After an interruption or a full disk, the same call resumes.

    Args:
        base: Folder of the base that the adapter was trained on, as for ``merge_adapter``. An adapter of a base in 4 or
            8 bits takes the same base without quantization, which does not concern what is written into it.
        adapter: The adapter's folder.
        out: Folder to create; must not exist.
        dtype: Of the base, by torch's name; None keeps each tensor's own.
        vision_tower: CLIP's folder, for a plain language model; None is the folder that the adapter's run used.
        projector: The stage-1 file that the adapter's run loaded; None is the file that the run used.
        shard_size: Maximum number of bytes per file.
        probe: Whether to compare the logits before and after, which reads both bases once more.
        bound: The largest accepted difference of the logits, relative to their standard deviation; None is 0.05.
        force: Accept a base of the right shape that the adapter was not trained on.
        progress: Called after each tensor with the number of bytes written and in total.

    Returns:
        What was written, and the difference of the logits.

    Raises:
        ConfigError: The adapter has nothing to write into a base, or no plain low-rank updates; a folder does not hold
            what its argument requires; or ``out`` exists.
        WeightsError: The adapter was trained on another base; a tensor has the wrong shape, is damaged or not finite;
            or the logits differ by more than the bound.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process writes the same folder.
    """
    final = expand_home(out)
    folder = find_folder(base, "base")
    _check_not_quantized(folder)
    opened, (whole,) = open_merge(
        folder,
        adapter,
        vision_tower=vision_tower,
        projector=projector,
        force=force,
        read_tower=read_tower_tensors,
        read_language=read_converted,
    )
    baked = _choose_baked(whole)
    plan = MergePlan(MergedTensors(opened, [replace(whole, updates=baked)]), None, folder)
    before = MergedTensors(opened, [whole])
    gaps: list[LogitsGap] = []

    def finish(staged: Path) -> None:
        write_chat_template(plan, staged)
        lora = staged / ADAPTER_FOLDER
        shutil.rmtree(lora, ignore_errors=True)  # of an attempt that was killed
        lora.mkdir()
        _write_lora(whole, baked, staged, final, vision_tower)
        if probe:
            logger.info("comparing the logits before and after")
            after, loras = open_merge(staged, lora, vision_tower=vision_tower, force=True)
            gaps.append(_measure_split(before, MergedTensors(after, loras), (whole.folder, folder, staged)))
            _check_gap(gaps[0], bound, final)
        _write_cards(staged, base, whole, sorted(baked), gaps)

    written = write_merged(plan, final, dtype=dtype, shard_size=shard_size, progress=progress, check=finish)
    return BakeReport(
        out=written.out,
        adapter=written.out / ADAPTER_FOLDER,
        baked=tuple(sorted(baked)),
        updates=len(whole.updates) - len(baked),
        tensors=written.tensors,
        nbytes=written.nbytes,
        seconds=written.seconds,
        gap=gaps[0] if gaps else None,
    )


def _check_not_quantized(base: Path) -> None:
    if (base / "config.json").is_file() and read_model_config(base).get("quantization_config"):
        what = "the base is stored quantized (quantization_config), and rows cannot be written into a copy of it"
        raise ConfigError.at(str(base / "config.json"), what, "give the same base without quantization")


def _choose_baked(adapter: Adapter) -> dict[str, Any]:
    """Return the updates of an adapter that are written into the base, by our names of its tensors.

    Raises:
        ConfigError: There are none, or the others are no plain low-rank updates.
    """
    low_rank = {
        name: update
        for name, update in adapter.updates.items()
        if isinstance(update, LowRank) and tensor_names.LAYER.search(name) is not None
    }
    baked = {name: update for name, update in adapter.updates.items() if name not in low_rank}
    where = str(adapter.folder)
    if any(update.magnitude is not None for update in low_rank.values()):
        what = "an adapter with DoRA does not become a plain LoRA, whatever is written into the base"
        raise ConfigError.at(where, what, "merge it as a whole with `llavar-peft merge`, or train with variant: lora")
    if not low_rank:
        what = "no low-rank updates of the language model would be left for the LoRA"
        raise ConfigError.at(where, what, "merge it as a whole with `llavar-peft merge`")
    if not baked:
        what = "nothing to write into a base: the adapter has low-rank updates of the language model only"
        raise ConfigError.at(where, what, "use the adapter as it is; `llavar-peft adapter verify --for vllm` checks it")
    return baked


def _write_lora(
    adapter: Adapter, baked: Mapping[str, Any], staged: Path, final: Path, vision_tower: str | Path | None
) -> None:
    """Write the low-rank updates that are left, with everything that an adapter's folder has.

    Args:
        adapter: The whole adapter.
        baked: Its updates that are in the base.
        staged: The folder of the finished base.
        final: The name that this folder will get.
        vision_tower: The tower's folder, if it was given.
    """
    from safetensors.torch import save_file

    folder, stored = staged / ADAPTER_FOLDER, open_adapter(adapter.folder)
    modules = sorted(name.removesuffix(".weight") for name in adapter.updates if name not in baked)
    names = [f"{PREFIX}{module}{end}" for module in modules for end in _LORA_ENDS]
    tensors: dict[str, Tensor] = {name: read_tensor(stored.table[name]).contiguous() for name in names}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_checksums(folder)
    settings = peft_settings(_without_other_settings(stored.settings, modules), modules)
    settings.base_model_name_or_path = str(final.resolve())
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    known, view = read_base_settings(adapter.folder), view_as_released(staged)
    has_tower = bool(read_tower_table(staged))
    tower = None if has_tower else vision_tower or known.vision_tower
    base = ModelConfig(
        checkpoint=str(final.resolve()),
        vision_tower=None if tower is None else str(tower),
        quantize=known.quantize,
        dtype=cast("Dtype", known.dtype),
    )
    write_json(folder / BASE_FILE, dataclasses.asdict(base))
    prints = {"base": take_fingerprint(view.table, view.config)}
    if read_model_config(staged).get(TUNED_TOWER):
        prints["tower"] = take_fingerprint(read_tower_table(staged), {})
    write_json(folder / FINGERPRINT_FILE, prints)
    _copy_companions(adapter.folder, staged, folder)


def _without_other_settings(settings: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """Return an adapter's settings with nothing but low-rank updates of some modules."""
    patterns = {
        key: {module: value for module, value in (settings.get(key) or {}).items() if module in modules}
        for key in ("rank_pattern", "alpha_pattern")
    }
    return {**settings, **patterns, "modules_to_save": None, "trainable_token_indices": None}


def _copy_companions(adapter: Path, staged: Path, folder: Path) -> None:
    """Copy the recipe of the run, and the configuration and processor of the base if they are of this package."""
    if (adapter / RESOLVED_RECIPE_FILE).is_file():
        shutil.copyfile(adapter / RESOLVED_RECIPE_FILE, folder / RESOLVED_RECIPE_FILE)
    source = staged if read_model_config(staged).get("model_type") == MODEL_TYPE else adapter
    if not (source / "config.json").is_file():
        return
    for path in find_companions(source, licences=False):
        copy_companion(path, folder)
    shutil.copyfile(source / "config.json", folder / "config.json")
    if (source / CHAT_TEMPLATE_FILE).is_file():
        shutil.copyfile(source / CHAT_TEMPLATE_FILE, folder / CHAT_TEMPLATE_FILE)


def _measure_split(before: MergedTensors, after: MergedTensors, tokenizers: tuple[Path, ...]) -> LogitsGap:
    """Measure how far the logits of two bases with unmerged adapters are apart."""
    text, image_id = read_config(before.base.config)
    ids = probe_ids(tokenizers, text.vocab_size, image_id)
    expected, got = (probe_logits(UnmergedWeights(one), text, ids, image_id) for one in (before, after))
    return logits_gap(expected, got)


def _check_gap(gap: LogitsGap, bound: float | None, out: Path) -> None:
    allowed = BOUND if bound is None else bound
    if not gap.relative <= allowed:  # also true for NaN
        raise WeightsError.at(
            str(out),
            f"not written: base and LoRA have other logits than the adapter on its base (got {gap.relative:.2g} of "
            f"their standard deviation, largest difference {gap.largest:.2g}; expected at most {allowed:g})",
            "write the base in a more precise dtype, or accept a larger difference with --bound",
        )


def _write_cards(staged: Path, base: str | Path, adapter: Adapter, baked: list[str], gaps: list[LogitsGap]) -> None:
    """Write the model cards of the base and of the LoRA."""
    figures = {"tensors that the adapter changed": f"{len(baked)}"}
    for gap in gaps:
        what = "difference of the logits with the LoRA from those before, in standard deviations"
        figures[what] = f"{gap.relative:.1e}"
    name, folder = adapter_name(adapter.folder), staged / ADAPTER_FOLDER
    title = f"{portable_name(base)} with what {name} trained besides its low-rank updates"
    write_weights_card(staged, title, {"base": base}, adapters=[adapter.folder], figures=figures)
    if (folder / "config.json").is_file():
        title = f"The low-rank updates of {name}, for the base in the folder above"
        write_weights_card(folder, title, {"base": base}, adapters=[adapter.folder], figures=figures)
