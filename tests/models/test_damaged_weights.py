"""Damaged weights are not loaded by anything that opens a model, and settings of images are checked with them."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavar_peft import ModelConfig, build_model, cli
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.models.build_model import build_pending_model, load_processor
from llavar_peft.weights.delta.delta_files import make_delta
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.projector_file import save_projector
from llavar_peft.weights.io.tensor_blocks import write_checksums
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER

PARTS = {"language_model": str(LANGUAGE_MODEL), "vision_tower": str(VISION_TOWER), "dtype": "float32"}
NAME = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "model"
    model, processor = build_model(ModelConfig(**PARTS))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_checksums(folder)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "model")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 0x01  # a small change of one number
    path.write_bytes(bytes(data))


def _put(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "weights_checksums.json").unlink()


@pytest.mark.parametrize("damage", ["flipped bit", "NaN", "infinity"])
def test_damaged_weights_are_named(damage: str, copy: Path) -> None:
    if damage == "flipped bit":
        _flip(copy / "model.safetensors")
    else:
        _put(copy, {"NaN": float("nan"), "infinity": float("inf")}[damage])
    expected = "wrong checksum" if damage == "flipped bit" else f"{NAME}: 1 of [0-9]+ elements are NaN or infinite"
    for build in (build_model, build_pending_model):
        with pytest.raises(WeightsError, match=expected):
            build(ModelConfig(checkpoint=str(copy), dtype="float32"))
    load_processor(str(copy))  # which needs no weights


@pytest.mark.parametrize(
    "command",
    [
        "ask --model {m} What?", "chat --model {m}",
        pytest.param("serve --model {m} --port 0", marks=pytest.mark.skipif(
            find_spec("fastapi") is None, reason="the extra serve is not installed, which is said first")),
        "generate --model {m} --questions q.jsonl --answers a.jsonl --images .", "convert {m} out --to hf-llava",
        "train r.yaml model.checkpoint={m}",
    ],
)  # fmt: skip
def test_every_command_refuses_damaged_weights(
    command: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _put(copy, float("nan"))
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "What?"}\n')
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "r.json").write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(4)]))
    stage = {
        "name": "s", "tune": "projector", "data": {"records": "r.json", "workers": 0}, "precision": "fp32",
        "optim": {"learning_rate": 1e-3}, "global_batch_size": 1, "micro_batch_size": 1, "max_steps": 1,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps({"stages": [stage], "output_dir": "run"}))
    assert cli.main([word.format(m=copy) for word in command.split()]) == 2
    assert "NaN or infinite" in " ".join(capsys.readouterr().err.split())


def test_a_part_in_the_place_of_another_is_named(tmp_path: Path) -> None:
    language_model = PARTS["language_model"]
    with pytest.raises(ConfigError, match="a language model, expected a vision tower"):
        build_model(ModelConfig(**{**PARTS, "vision_tower": language_model}))
    whole = Path(str(language_model)) / "model.safetensors"
    with pytest.raises(WeightsError, match=r"a complete model, expected those of a projector.*model.checkpoint"):
        build_model(ModelConfig(**PARTS, projector=str(whole)))
    with pytest.raises(ConfigError, match=r"a URL, expected a folder.*download"):
        build_model(ModelConfig(**{**PARTS, "vision_tower": "https://huggingface.co/openai/clip"}))


def test_a_damaged_tower_and_a_damaged_projector_are_named(tmp_path: Path) -> None:
    tower = shutil.copytree(VISION_TOWER, tmp_path / "tower")
    tensors = load_file(tower / "model.safetensors")
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    tensors[name][0, 0] = torch.inf
    save_file(tensors, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"fc1\.weight: 1 of"):
        build_model(ModelConfig(**{**PARTS, "vision_tower": str(tower)}))
    model, _ = build_model(ModelConfig(**PARTS))
    projector = model.model.multi_modal_projector
    weight = projector.weight.detach().clone()
    weight[0, 0] = torch.nan
    bias, embeddings = projector.bias, model.get_input_embeddings().weight
    save_projector(
        tmp_path,
        {
            tensor_names.PROJECTOR_WEIGHT: weight,
            tensor_names.PROJECTOR_BIAS: bias,
            tensor_names.EMBEDDINGS: embeddings,
        },
    )
    for file in ("mm_projector.bin", "mm_projector.safetensors"):
        with pytest.raises(WeightsError, match=r"mm_projector\.weight: 1 of"):
            build_model(ModelConfig(**PARTS, projector=str(tmp_path / file)))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rescale_factor": [1]}, "unusable settings"),
        ({"crop_size": {"height": 10**9, "width": 10**9}}, "expected 1 to"),
        ({"image_mean": [0.5, None, 0.5]}, "unusable settings"),
        ({"image_std": [0.5, 0.0, 0.5]}, "expected three numbers"),
        ({"image_mean": [0.5]}, "expected three numbers"),
        ({"resample": 99}, "unusable settings"),
    ],
)
def test_settings_of_images_are_checked_when_they_are_loaded(changes: dict[str, Any], what: str, copy: Path) -> None:
    path = copy / "processor_config.json"
    stored = json.loads(path.read_text())
    stored["image_processor"].update(changes)
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=what):
        load_processor(str(copy))


def test_ids_beyond_the_embeddings_are_named(copy: Path) -> None:
    path = copy / "tokenizer.json"
    stored = json.loads(path.read_text())
    added = {**stored["added_tokens"][0], "content": "<more>", "id": 5000}
    stored["added_tokens"].append(added)
    stored["model"]["vocab"]["<more>"] = 5000
    path.write_text(json.dumps(stored))
    with pytest.raises(WeightsError, match=r"do not belong together \(got the id 5000"):
        build_model(ModelConfig(checkpoint=str(copy), dtype="float32"))


def test_a_checkpoint_without_the_settings_of_its_tower_is_named(copy: Path, tmp_path: Path) -> None:
    path = copy / "config.json"
    stored = json.loads(path.read_text())
    del stored["vision_config"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="settings of a language model and a tower cannot be read"):
        make_delta(LANGUAGE_MODEL, copy, tmp_path / "out")
