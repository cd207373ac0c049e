"""A model stored in 4 bits equals the model that is quantized when it is loaded; its adapters fit the original."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("bitsandbytes")

from llavar_peft import (
    DataConfig,
    Lora,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    Projector,
    Recipe,
    Stage,
    Trainer,
    build_model,
    cli,
    export,
    load_chat,
    make_delta,
    merge_adapter,
)
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.models.quantized_checkpoint import prepare_recipe, with_stored_quantization
from llavar_peft.weights.adapter.adapter_files import read_base_settings
from llavar_peft.weights.io.quantized_weights import STATE
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter

IDS = torch.tensor([[1, 40, 41, 861, *[860] * 144, 862, 43]])
_ALL = pytest.mark.skipif(os.environ.get("LLAVAR_QUANTIZED") != "all", reason="runs with LLAVAR_QUANTIZED=all")
LAYER = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in fp16."""
    folder = tmp_path_factory.mktemp("original") / "model"
    parts = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float16")
    model, processor = build_model(parts)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(original: Path) -> Path:
    """The same model in 4 bits."""
    export(original, original.with_name("nf4"), to="llavar", quantize="nf4")
    return original.with_name("nf4")


def _language(folder: Path) -> dict[str, Tensor]:
    return {name: one for name, one in load_file(folder / "model.safetensors").items() if "language_model" in name}


def _logits(model: torch.nn.Module) -> Tensor:
    pixels = torch.randn(1, 3, 120, 120, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, pixel_values=pixels.to(next(model.parameters()).dtype)).logits
    return logits


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=_ALL)])
def test_it_equals_the_model_that_is_quantized_when_it_is_loaded(dtype: str, original: Path, stored: Path) -> None:
    expected, _ = build_model(ModelConfig(checkpoint=str(original), quantize="nf4", dtype=dtype))  # type: ignore[arg-type]
    got, _ = build_model(ModelConfig(checkpoint=str(stored), dtype=dtype))  # type: ignore[arg-type]
    assert torch.equal(_logits(expected), _logits(got))
    assert {name: one.dtype for name, one in got.named_parameters()} == {
        name: one.dtype for name, one in expected.named_parameters()
    }


@_ALL
def test_it_is_stored_as_transformers_stores_it(original: Path, stored: Path, tmp_path: Path) -> None:
    """Also a folder that transformers wrote is opened, and its tensors are the same."""
    model, processor = build_model(ModelConfig(checkpoint=str(original), quantize="nf4", dtype="float16"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    theirs, ours = load_file(tmp_path / "model.safetensors"), load_file(stored / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if name.endswith(STATE):
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(ours[name].tolist()))
        else:
            assert torch.equal(tensor, ours[name]), name
    opened, _ = build_model(ModelConfig(checkpoint=str(tmp_path), dtype="float16"))
    assert torch.equal(_logits(opened), _logits(model))


def test_it_takes_a_part_of_the_disk(original: Path, stored: Path) -> None:
    whole, packed = ((folder / "model.safetensors").stat().st_size for folder in (original, stored))
    linear = sum(one.numel() for name, one in _language(original).items() if "_proj." in name)
    assert whole - packed > 1.2 * linear  # the tower and the embeddings are most of a tiny model


@_ALL
def test_fsdp2_gets_the_packed_bytes_in_the_dtype_of_the_computation(
    original: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llavar_peft.models.build_model.requested_sharding", lambda: "fsdp2")
    logits = []
    for folder in (original, stored):
        model, _ = build_model(ModelConfig(checkpoint=str(folder), quantize="nf4", dtype="float16"))
        weight = model.get_parameter(LAYER)
        assert weight.dtype == weight.quant_storage == torch.float16
        logits.append(_logits(model))
    assert torch.equal(*logits)


@_ALL
def test_an_adapter_that_was_trained_on_it_is_merged_into_the_original(
    original: Path, stored: Path, tmp_path: Path
) -> None:
    write_synthetic(tmp_path / "data", 6, SynthSettings(style="plain", seed=7, task="question"))
    data = DataConfig(records=str(tmp_path / "data/records.json"), images=str(tmp_path / "data/images"), workers=0)
    tune = Lora(rank=4, alpha=8, dropout=0.0)
    stage = Stage(
        name="tune", data=data, tune=tune, optim=OptimConfig(learning_rate=1e-2), max_steps=2, global_batch_size=2,
        micro_batch_size=1, max_length=512, precision="fp32", probe=ProbeConfig(images=0),
    )  # fmt: skip
    recipe = Recipe(model=ModelConfig(checkpoint=str(stored)), stages=(stage,), output_dir=str(tmp_path / "run"))
    trainer = Trainer(*build_model(recipe.model), recipe)
    adapter = trainer.train()
    settings = read_base_settings(adapter)
    assert (settings.quantize, settings.dtype, settings.quantized_from) == ("nf4", "float32", "float16")
    chat = load_chat(adapter)
    assert chat.engine.quantize == "nf4"
    trained = _logits(chat.engine.model)
    report = merge_adapter(original, adapter, tmp_path / "merged", dtype="float32")
    assert report.gaps["result"].relative < 1e-5
    assert torch.allclose(_logits(load_chat(tmp_path / "merged").engine.model), trained, atol=1e-3)


def test_the_numbers_before_the_quantization_count_in_a_merge(stored: Path, original: Path, tmp_path: Path) -> None:
    """Computed in bfloat16, the base is still the one that was quantized from fp16."""
    base = with_stored_quantization(ModelConfig(checkpoint=str(stored), dtype="bfloat16"))
    wrapped = save_moved_adapter(tmp_path / "adapter", base, Lora(rank=4, alpha=8, dropout=0.0), by=0.0)
    merge_adapter(original, tmp_path / "adapter", tmp_path / "merged", dtype="float32", probe=False)
    layer = wrapped.get_base_model().get_parameter(LAYER.replace(".weight", ".base_layer.weight"))
    with pytest.raises(ConfigError, match="needs the original numbers"):
        merge_adapter(stored, tmp_path / "adapter", tmp_path / "out")
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(
        functional.dequantize_4bit(layer.data, layer.quant_state).float(),
        load_file(tmp_path / "merged/model.safetensors")[LAYER],
    )


def test_what_needs_the_original_numbers_says_so(stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"stored in nf4, and can be opened in no other format.*leave quantize out"):
        build_model(ModelConfig(checkpoint=str(stored), quantize="int8"))
    for call in (
        lambda: export(stored, out, to="hf-llava"),
        lambda: export(stored, out, to="llavar", quantize="nf4"),
        lambda: make_delta(LANGUAGE_MODEL, stored, out),
        lambda: make_delta(stored, stored, out),
    ):
        with pytest.raises(ConfigError, match=r"needs the original numbers.*Fix: give the unquantized model"):
            call()
    stage = Stage(
        name="one", data=DataConfig(records="r.json"), tune=Projector(), optim=OptimConfig(learning_rate=1e-3),
        global_batch_size=1, micro_batch_size=1,
    )  # fmt: skip
    recipe = Recipe(model=ModelConfig(checkpoint=str(stored)), stages=(stage,), output_dir="run")
    with pytest.raises(ConfigError, match=r"stages\.0\.tune: a projector stage writes a whole model"):
        prepare_recipe(recipe)
    full = dataclasses.replace(stage, tune=Lora(variant="pissa"))
    with pytest.raises(ConfigError, match="pissa"):
        prepare_recipe(dataclasses.replace(recipe, stages=(full,)))
    assert not out.exists()


def test_conversions_that_cannot_be_in_4_bits(original: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"to": "hf-llava", "quantize": "nf4"}, "has the layout llavar"),
        ({"to": "llavar", "quantize": "int8"}, "only nf4 can be stored"),
        ({"to": "llavar", "quantize": "nf4", "form": "bin"}, "in safetensors"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(original, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert cli.main(["convert", str(original), str(tmp_path / "out"), "--to", "original", "--quantize", "nf4"]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(b"[128, 128]", b"[128, 127]"), "describes another matrix"),
        (lambda text: text.replace(b"{", b"["), "not a description of a matrix in 4 bits"),
        (lambda text: text.replace(b'"float16"', b'"float99"'), "describes another matrix"),
    ],
)
def test_a_damaged_description_is_named(change: object, message: str, stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    text = change(bytes(tensors[LAYER + STATE].tolist()))  # type: ignore[operator]
    tensors[LAYER + STATE] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    (folder / "weights_checksums.json").unlink()
    with pytest.raises(WeightsError, match=message):
        build_model(ModelConfig(checkpoint=str(folder)))


def test_another_quantization_is_rejected(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "awq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantization_config\.quant_method: weights that are quantized in a way"):
        build_model(ModelConfig(checkpoint=str(folder)))
