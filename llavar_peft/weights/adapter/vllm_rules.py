"""What keeps vLLM from loading an adapter, or from applying all of it, found in the adapter's files.

vLLM applies low-rank updates of a language model's linear layers, and has no place for other trained tensors. Some
adapters it rejects; of others it applies a part and says nothing, so that the answers are wrong.

Source: vLLM 0.32 and 0.33, vllm/lora/peft_helper.py (settings), lora_model.py and utils.py (names of tensors),
model_manager.py (which modules get updates), vllm/config/lora.py (ranks), models/llava.py (renamed tensors).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavar_peft.errors import Fault
from llavar_peft.weights.adapter.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    read_base_settings,
    read_settings,
)
from llavar_peft.weights.adapter.adapter_layouts import AdapterOnDisk, open_adapter
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.stated_resolution import RESOLUTION, resolution_of_adapter
from llavar_peft.weights.io.tensor_blocks import join_first

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that ``--max-lora-rank`` accepts."""
_UPDATE = (".lora_A.weight", ".lora_B.weight")
_LANGUAGE_MODEL = "model.language_model."
_READ_BY_VLLM = (_LANGUAGE_MODEL, "language_model.model.", tensor_names.HEAD.removesuffix("weight"))
"""How names begin, after peft's prefix, that vLLM's LLaVA maps to its language model."""
_INITIAL_VALUES_ONLY = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_NOT_IMPLEMENTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of updates (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
}
"""Kinds of LoRA that vLLM rejects, by the setting of ``adapter_config.json`` that selects them."""
_NOT_SPLIT = ("use_dora", "lora_bias")
"""Settings with which ``adapter bake`` leaves no plain LoRA."""
_NO_CROSS_ATTENTION = "vLLM has no cross-attention"
_OTHER_RESOLUTION = "use `llavar-peft serve`, or train with tiles and pool 1"
_JOINED = ".qkv_proj"
"""The joint layer of Phi-3, which vLLM splits, and whose updates it then does not recognize (vLLM 0.32, run)."""
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class VllmCheck:
    """Whether vLLM applies an adapter as it was trained.

    Attributes:
        faults: Every reason why it does not; empty if it does.
        max_lora_rank: The smallest value of ``--max-lora-rank`` with which it loads the adapter; None for a rank above
            all of them.
        quantize: How the base was quantized in training: vLLM's answers are those of the base that it is given.
    """

    faults: tuple[Fault, ...]
    max_lora_rank: int | None
    quantize: str | None


def check_for_vllm(folder: str | Path) -> VllmCheck:
    """Find everything that keeps vLLM from applying an adapter as it was trained; only headers are read.

    Args:
        folder: The adapter's folder.

    Raises:
        ConfigError: The folder holds no adapter.
        WeightsError: A file is damaged.
    """
    stored = open_adapter(folder)
    rank = 0
    if stored.settings["peft_type"] == "LORA":  # the settings of other kinds have not been checked
        # vLLM counts all ranks that the file names, also of modules that have no update.
        patterns = read_settings(stored.folder).get("rank_pattern") or {}
        rank = max([int(stored.settings["r"]), *patterns.values()])
    smallest = next((value for value in RANKS if rank <= value), None)
    faults = [*_find_setting_faults(stored, rank, smallest), *_find_tensor_faults(stored)]
    resolution = resolution_of_adapter(stored.folder) or {}
    if (resolution.get("type") == "cross_attention" or resolution.get("pool", 1) != 1) and not any(
        _NO_CROSS_ATTENTION in fault.what for fault in faults
    ):
        what = f"{_NO_CROSS_ATTENTION} and does not average patches (got {ascii(dict(resolution))[:80]})"
        faults.append(Fault(f"{stored.folder / 'config.json'}:{RESOLUTION}", what, _OTHER_RESOLUTION))
    return VllmCheck(tuple(faults), smallest, read_base_settings(stored.folder).quantize)


def _retraining(folder: Path) -> str:
    """Return the ways to a model that vLLM serves where an adapter cannot be split, for a message."""
    command = shlex.join(["llavar-peft", "merge", "--adapter", str(folder)])
    return f"train with `--preset lora-vllm`, or merge it (`{command} ...`)"


def _baking_of(folder: Path, settings: Mapping[str, Any]) -> str:
    """Return the command that puts what vLLM has no place for into a copy of the base, for a message."""
    if any(settings.get(name) for name in _NOT_SPLIT):
        return _retraining(folder)
    base = read_base_settings(folder).fields.get("checkpoint")
    command = ["llavar-peft", "adapter", "bake", str(folder), "--base", str(base or "BASE"), "--out", "OUT"]
    return f"put these into a copy of the base: `{shlex.join(command)}`; or train with `--preset lora-vllm`"


def _find_setting_faults(stored: AdapterOnDisk, rank: int, smallest: int | None) -> Iterator[Fault]:
    settings, where = stored.settings, str(stored.folder / ADAPTER_CONFIG)
    retrain = _retraining(stored.folder)
    if settings["peft_type"] != "LORA":
        yield Fault(where, f"vLLM loads LoRA only (got peft_type {ascii(settings['peft_type'])[:80]})", retrain)
        return
    for name, kind in _NOT_IMPLEMENTED.items():
        if settings.get(name):
            yield Fault(f"{where}:{name}", f"vLLM has no {kind}", retrain)
    if settings.get("bias", "none") != "none":
        what = f"vLLM does not load biases of the base (got {ascii(settings['bias'])[:80]}, expected 'none')"
        yield Fault(f"{where}:bias", what, retrain)
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower() not in _INITIAL_VALUES_ONLY:
        what = f"vLLM rejects adapters whose initial values changed the base (got {ascii(initial)[:80]})"
        fix = "convert it with peft's path_initial_model_for_weight_conversion; PiSSA of this package needs none"
        yield Fault(f"{where}:init_lora_weights", what, fix)
    if smallest is None:
        yield Fault(f"{where}:r", f"vLLM's largest rank is {RANKS[-1]} (got {rank})", retrain)


def _find_tensor_faults(stored: AdapterOnDisk) -> Iterator[Fault]:
    """Yield a fault for each kind of tensors that vLLM rejects, or reads without applying them."""
    where = str(stored.folder / ADAPTER_WEIGHTS)
    found: dict[str, list[str]] = {}
    for name, entry in stored.table.items():
        kind = _kind_of(name, entry.name)
        # A file of LLaVA's own code, which vLLM does not read.
        found.setdefault("in full" if entry.path.stem == "non_lora_trainables" else kind, []).append(
            name.removeprefix(PREFIX)
        )
    bake = _baking_of(stored.folder, stored.settings)
    for kind, what, fix in (
        ("in full", "vLLM does not load tensors that were trained in full", bake),
        ("cross-attention", _NO_CROSS_ATTENTION, _OTHER_RESOLUTION),
        ("rows", "vLLM does not load trained rows of the embeddings", bake),
        ("outside", "vLLM leaves out updates outside the language model and answers without them", bake),
        (
            "joined",
            "vLLM loads updates of q_proj, k_proj and v_proj, but not of a joint qkv_proj",
            "merge it as a whole with `llavar-peft merge`, or train with a list of other layers as target",
        ),
        ("named otherwise", "vLLM does not find the layers of these names", "save the adapter again with peft"),
    ):
        if kind in found:
            yield Fault(where, f"{what} (got {join_first(found[kind], _SHOWN)})", fix)


def _kind_of(ours: str, stored: str) -> str:
    """Return what vLLM makes of a tensor.

    Args:
        ours: The name that peft gives it in our model.
        stored: Its name in the file.
    """
    plain = ours.removeprefix(PREFIX)
    if plain.startswith(tensor_names.CROSS_ATTENTION):
        return "cross-attention"
    if "trainable_tokens_delta" in plain:
        return "rows"
    if plain.endswith((".lora_magnitude_vector", ".lora_B.bias")):
        return "of a setting"  # which is a fault of its own
    if not plain.endswith(_UPDATE):
        return "in full"
    if not plain.startswith((_LANGUAGE_MODEL, "lm_head.")):
        return "outside"
    if plain.removesuffix(_UPDATE[0]).removesuffix(_UPDATE[1]).endswith(_JOINED):
        return "joined"
    read = stored.endswith(_UPDATE) and stored.removeprefix(PREFIX).startswith(_READ_BY_VLLM)
    return "applied" if read else "named otherwise"
