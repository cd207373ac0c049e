"""The hash that results carry: of the weights, wherever and however they are stored."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llavar_peft.weights.adapter.model_hash import identify_model


def test_the_hash_is_of_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    known = identify_model(checkpoint)
    moved = tmp_path / "run" / "model"
    shutil.copytree(checkpoint, moved)
    assert identify_model(moved) == known
    assert identify_model(tmp_path / "run") == known
    tensors = load_file(moved / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, moved / "model.safetensors")
    assert identify_model(moved) == known
    projector = next(name for name in tensors if name.endswith("multi_modal_projector.bias"))
    tensors[projector] = tensors[projector] + 1
    save_file(tensors, moved / "model.safetensors")
    assert identify_model(moved) != known


def test_an_adapter_and_its_base_both_count(checkpoint: Path, tmp_path: Path) -> None:
    def adapter(name: str, value: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
        save_file({"q_proj.lora_A.weight": torch.full((2, 4), value)}, folder / "adapter_model.safetensors")
        return folder

    first, second = adapter("first", 1.0), adapter("second", 2.0)
    hashes = {identify_model(checkpoint), identify_model(checkpoint, first), identify_model(checkpoint, second)}
    assert len(hashes) == 3
    assert identify_model(first) != identify_model(second)  # an adapter's folder alone, which knows its base
