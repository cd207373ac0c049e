"""Merges of damaged or mismatched inputs, and merges that are killed: the error names the file, and nothing is left."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavar_peft import ModelConfig, build_model, make_delta, merge_adapter
from llavar_peft.errors import LlavarError
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.recipe.schema import Lora
from llavar_peft.weights.io.tensor_blocks import write_checksums
from llavar_peft.weights.io.tensor_table import read_file_table
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter
from tests.weights.killing import kill_twenty_times

TUNE = Lora(rank=4, alpha=8, dropout=0.0)
PARTS = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
SHARD = "model-00002-of-00003.safetensors"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three shards with checksums, as saved by a run."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model, processor = build_model(PARTS)
    model.save_pretrained(folder, max_shard_size="4MB")
    processor.save_pretrained(folder)
    write_checksums(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_moved_adapter(folder, ModelConfig(checkpoint=str(base), dtype="float32"), TUNE)
    return folder


def _delete(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_bit(path: Path) -> None:
    """Flip the lowest bit of an element of the language model."""
    place = next(entry.offset for name, entry in read_file_table(path).items() if ".language_model.layers." in name)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _nan(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if ".language_model.layers." in name)
    tensors[name][0, ..., 0] = torch.nan
    save_file(tensors, path)
    if not path.name.startswith("adapter"):
        write_checksums(path.parent)  # the checksums are those of the NaN
    else:
        (path.parent / "weights_checksums.json").unlink()


def _rename(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if ".language_model.layers." in name)
    tensors[name.replace("layers.", "lost.")] = tensors.pop(name)
    save_file(tensors, path)
    (path.parent / "weights_checksums.json").unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


_DAMAGE: tuple[tuple[str, Callable[[Path], None], str], ...] = (
    *((SHARD, damage, SHARD) for damage in (_delete, _truncate, _flip_bit, _empty)),
    (SHARD, _nan, "mlp.gate_proj.weight"),
    (SHARD, _rename, "language_model."),
    ("config.json", _halve, "config.json"),
    ("model.safetensors.index.json", _empty, "index"),
    *((ADAPTER, damage, ADAPTER) for damage in (_delete, _truncate, _flip_bit, _empty)),
    (ADAPTER, _nan, "NaN"),
    (ADAPTER, _rename, "lost."),
    ("adapter_config.json", _delete, "adapter_config.json"),
    ("adapter_config.json", _halve, "adapter_config.json"),
    ("base.json", _halve, "base.json"),
    (FINGERPRINT_FILE, _halve, FINGERPRINT_FILE),
)


def _nothing_is_left(folder: Path) -> bool:
    return not [path.name for path in folder.iterdir() if path.name not in ("base", "adapter")]


@pytest.mark.torture
@pytest.mark.parametrize(
    ("file", "damage", "named"), _DAMAGE, ids=[f"{file}-{damage.__name__[1:]}" for file, damage, _ in _DAMAGE]
)
def test_damage_is_named_and_nothing_is_left(
    file: str, damage: Callable[[Path], None], named: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    ours = shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")
    damage(next(path / file for path in ours if (path / file).exists()))
    for attempt in (
        lambda: merge_adapter(*ours, tmp_path / "out"),
        lambda: make_delta(LANGUAGE_MODEL, ours[0], tmp_path / "out", adapter=ours[1]),
    ):
        with pytest.raises(LlavarError) as raised:
            attempt()
        text = str(raised.value)
        assert named in text
        assert str(tmp_path) in text
        assert "Fix: " in text
        assert _nothing_is_left(tmp_path)


def _other(base: Path, folder: Path, change: Callable[[LlavarForConditionalGeneration], None]) -> Path:
    """Save a base with another shape."""
    model, processor = build_model(ModelConfig(checkpoint=str(base), dtype="float32"))
    change(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _fewer_layers(model: LlavarForConditionalGeneration) -> None:
    del model.model.language_model.layers[-1]
    model.config.text_config.num_hidden_layers -= 1


def _more_layers(model: LlavarForConditionalGeneration) -> None:
    layers = model.model.language_model.layers
    layers.append(copy.deepcopy(layers[0]))
    model.config.text_config.num_hidden_layers += 1


def _narrower(model: LlavarForConditionalGeneration) -> None:
    for layer in model.model.language_model.layers:
        mlp = layer.mlp
        for one in (mlp.gate_proj, mlp.up_proj):
            one.weight.data = one.weight.data[:-8].clone()
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :-8].clone()
    model.config.text_config.intermediate_size -= 8


def _fewer_words(model: LlavarForConditionalGeneration) -> None:
    for one in (model.get_input_embeddings(), model.lm_head):
        one.weight.data = one.weight.data[:-5].clone()
    model.config.text_config.vocab_size -= 5


@pytest.mark.torture
@pytest.mark.parametrize("change", [_fewer_layers, _more_layers, _narrower, _fewer_words], ids=lambda one: one.__name__)
def test_a_base_of_another_shape_is_rejected(
    change: Callable[[LlavarForConditionalGeneration], None], base: Path, tmp_path: Path
) -> None:
    """Rejected because of its fingerprint, or with ``force`` because the tensors do not fit."""
    rows = dataclasses.replace(TUNE, train_image_rows=True)
    adapter = tmp_path / "adapter"
    save_moved_adapter(adapter, ModelConfig(checkpoint=str(base), dtype="float32"), rows)
    other = _other(base, tmp_path / "base", change)
    for force in (False, True) if change is not _more_layers else (False,):
        with pytest.raises(LlavarError) as raised:
            merge_adapter(other, adapter, tmp_path / "out", force=force)
        assert str(adapter) in str(raised.value)
        assert "Fix: " in str(raised.value)
        assert _nothing_is_left(tmp_path)


_JOB = """
from llavar_peft import merge_adapter
folder_writer._SYNC_AFTER = 200_000
def work(folder, progress):
    merge_adapter(first, second, folder, progress=progress, dtype="float16", shard_size=2_000_000, probe=False)
"""


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_twenty_random_moments(base: Path, adapter: Path, tmp_path: Path) -> None:
    kill_twenty_times(_JOB, base, adapter, tmp_path)
