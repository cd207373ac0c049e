"""Adapters in the layouts of other programs give the same updates, and all commands accept the same adapters."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavar_peft import cli
from llavar_peft.errors import LlavarError, WeightsError
from llavar_peft.models.adapter_loading import load_adapter
from llavar_peft.weights.adapter.adapter_report import describe_adapter, verify_adapter
from llavar_peft.weights.adapter.lora_updates import LowRank, read_adapter
from tests.weights.test_adapter_files import checkpoint, valid

__all__ = ["checkpoint", "valid"]

PREFIX = "base_model.model."
LAYERS, PROJECTOR = PREFIX + "model.language_model.", PREFIX + "model.multi_modal_projector."


def _settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _as_llava(folder: Path, tensors: dict[str, Tensor]) -> None:
    projector = {
        name.replace("multi_modal_projector", "mm_projector"): tensor
        for name, tensor in tensors.items()
        if name.startswith(PROJECTOR)
    }
    layers = {name.replace("model.language_model.", "model."): one for name, one in tensors.items() if ".lora_" in name}
    torch.save(projector, folder / "non_lora_trainables.bin")
    save_file(layers, folder / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    _settings(folder, target_modules=targets, modules_to_save=None)


def _as_old_stock(folder: Path, tensors: dict[str, Tensor]) -> None:
    renamed = {
        name.replace(LAYERS, PREFIX + "language_model.model.").replace(
            PROJECTOR, PREFIX + "multi_modal_projector."
        ): one
        for name, one in tensors.items()
    }
    save_file(renamed, folder / "adapter_model.safetensors")


def _as_bin(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / "adapter_model.safetensors").unlink()
    named = {name.replace(".lora_A.", ".lora_A.default."): one for name, one in tensors.items()}
    torch.save(named, folder / "adapter_model.bin")


def _convert(valid: Path, folder: Path, layout: Any) -> Path:
    shutil.copytree(valid, folder)
    for name in ("weights_checksums.json", "weights_fingerprint.json"):
        (folder / name).unlink(missing_ok=True)
    layout(folder, load_file(valid / "adapter_model.safetensors"))
    return folder


@pytest.mark.parametrize("layout", [_as_llava, _as_old_stock, _as_bin])
def test_an_adapter_in_another_layout_is_the_same_adapter(
    layout: Any, valid: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = _convert(valid, tmp_path / "adapter", layout)
    ours, theirs = read_adapter(valid).updates, read_adapter(folder).updates
    assert set(ours) == set(theirs)
    for name, update in ours.items():
        other = theirs[name]
        assert isinstance(other, type(update))
        if isinstance(update, LowRank) and isinstance(other, LowRank):
            assert torch.equal(update.a, other.a)
            assert torch.equal(update.b, other.b)
    assert verify_adapter(folder, base=checkpoint).tensors == verify_adapter(valid, base=checkpoint).tensors
    assert describe_adapter(folder).parameters == describe_adapter(valid).parameters


@pytest.mark.slow
@pytest.mark.parametrize("layout", [_as_llava, _as_bin])
def test_a_model_takes_an_adapter_in_another_layout(layout: Any, valid: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = _convert(valid, tmp_path / "adapter", layout)
    states = [load_adapter(str(checkpoint), each, force=True).state_dict() for each in (valid, folder)]
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"r": 0}, "expected a positive integer"),
        ({"r": -64}, "expected a positive integer"),
        ({"r": True}, "Expected `int`, got `bool`"),
        ({"lora_alpha": float("nan")}, "expected a finite number"),
        ({"lora_alpha": "8"}, r"Expected `int \| float`, got `str`"),
        ({"rank_pattern": {"q_proj": 0}}, "expected a positive integer"),
        ({"r": 2}, "expected rank 2"),
        ({"use_dora": True}, "magnitude"),
        ({"use_qalora": True}, "use_qalora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"peft_type": "IA3"}, "unsupported peft_type"),
    ],
)
def test_show_verify_and_merge_reject_the_same(changes: dict[str, Any], what: str, valid: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(valid, tmp_path / "adapter")
    _settings(folder, **changes)
    messages = set()
    for reader in (describe_adapter, verify_adapter, read_adapter):
        with pytest.raises(LlavarError, match=what) as caught:
            reader(folder)
        messages.add(str(caught.value).splitlines()[0])
    assert len(messages) == 1


def test_placeholders_of_zero_3_are_named(valid: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(valid, tmp_path / "adapter")
    (folder / "weights_checksums.json").unlink()
    stored = load_file(valid / "adapter_model.safetensors")
    save_file({name: torch.zeros(0) for name in stored}, folder / "adapter_model.safetensors")
    for reader in (describe_adapter, verify_adapter, read_adapter):
        with pytest.raises(WeightsError, match="ZeRO-3 saved placeholders"):
            reader(folder)


def test_updates_of_the_embeddings_are_named(valid: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(valid, tmp_path / "adapter")
    (folder / "weights_checksums.json").unlink()
    stored = load_file(valid / "adapter_model.safetensors")
    stored[LAYERS + "embed_tokens.lora_embedding_A"] = torch.zeros(4, 8)
    save_file(stored, folder / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="low-rank update of the embeddings"):
        read_adapter(folder)


ENDLESS = r"(?:[a-z_.0-9]+)*\.none|(x+x+)+y"
"""With ``re``, matching it with a module's name does not end."""


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"target_modules": ENDLESS}, "target_modules does not select them"),
        ({"target_modules": "(("}, "no regular expression"),
        ({"target_modules": ["q_proj"]}, "target_modules does not select them"),
        ({"target_modules": ["q_proj", "(a+)+$"]}, "expected a name of letters"),
        ({"modules_to_save": ["(a+)+$"]}, "expected a name of letters"),
        ({"modules_to_save": "x"}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "expected rank 2"),
        ({"rank_pattern": {"[": 2}}, "no regular expression"),
        ({"r": 10**9}, "expected a positive integer up to"),
        ({"layers_to_transform": "x"}, "layers_to_transform"),
        ({"trainable_token_indices": [1, 1]}, "different numbers of rows"),
        ({"lora_dropout": "x"}, "lora_dropout"),
    ],
)
def test_settings_that_no_adapter_has_are_rejected(
    changes: dict[str, Any], what: str, valid: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(valid, tmp_path / "adapter")
    _settings(folder, **changes)
    for reader in (describe_adapter, verify_adapter, read_adapter, partial(load_adapter, str(checkpoint))):
        with pytest.raises(LlavarError, match=what):
            reader(folder)


@pytest.mark.parametrize("key", ["exclude_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_never_reach_peft(key: str, valid: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The adapter is valid, because the pattern selects nothing; peft would match it with ``re``."""
    folder = shutil.copytree(valid, tmp_path / "adapter")
    _settings(folder, **{key: ENDLESS if key == "exclude_modules" else {ENDLESS: 4}})
    assert verify_adapter(folder, base=checkpoint).base == "fingerprint"
    loaded = load_adapter(str(checkpoint), folder)
    assert loaded.peft_config["default"].rank_pattern == {}


def test_patterns_of_ranks_and_scales_are_those_of_peft(valid: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(valid, tmp_path / "adapter")
    _settings(folder, alpha_pattern={r"self_attn\.[qk]_proj": 16, "up_proj": 2, r"layers\.0\..*": 6})
    scales = {
        name: update.scale for name, update in read_adapter(folder).updates.items() if isinstance(update, LowRank)
    }
    loaded = load_adapter(str(checkpoint), folder)
    theirs = {
        f"{name}.weight": module.scaling["default"]
        for name, module in loaded.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    assert scales == theirs
    assert {4.0, 0.5, 1.5} <= set(scales.values())


def test_an_adapter_in_a_bin_is_merged(valid: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = _convert(valid, tmp_path / "adapter", _as_bin)
    command = ["merge", "--base", str(checkpoint), "--no-probe"]
    for adapter, out in ((valid, "a"), (folder, "b")):
        assert cli.main([*command, "--adapter", str(adapter), "--out", str(tmp_path / out)]) == 0
    merged = [load_file(tmp_path / out / "model.safetensors") for out in ("a", "b")]
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())
