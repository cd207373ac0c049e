"""``adapter show`` and ``adapter verify`` for valid and damaged adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llavar_peft
from llavar_peft import Lora, ModelConfig, build_model, cli
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.training.save_weights import save_trained
from llavar_peft.weights.adapter.adapter_report import describe_adapter, verify_adapter

TINY_PARTS = Path(llavar_peft.__file__).parent / "assets/tiny"
PARTS = ModelConfig(
    language_model=str(TINY_PARTS / "language_model"), vision_tower=str(TINY_PARTS / "vision_tower"), dtype="float32"
)
LAYER = "base_model.model.model.language_model.layers.0.mlp.down_proj"


def _adapter(folder: Path, base: ModelConfig, tune: Lora) -> Path:
    """Save an adapter as a run does, after changing every trained parameter."""
    model, processor = build_model(base)
    wrapped = apply_tuning(model, tune, new_rows=base.language_model is not None)
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.03
    folder.mkdir(parents=True)
    save_trained(wrapped, processor, folder, state=wrapped.state_dict(), tune=tune, base=base)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    model, processor = build_model(PARTS)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def valid(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32")
    return _adapter(tmp_path_factory.mktemp("adapters") / "valid", base, Lora(rank=4, alpha=8))


@pytest.fixture
def copy(valid: Path, tmp_path: Path) -> Path:
    return shutil.copytree(valid, tmp_path / "copy")


def test_an_adapter_is_described(valid: Path, checkpoint: Path) -> None:
    report = describe_adapter(valid)
    stored = load_file(valid / "adapter_model.safetensors")
    assert (report.variant, report.rank, report.alpha, report.target) == ("lora", 4, 8.0, "all-linear")
    assert (report.tensors, report.parameters) == (len(stored), sum(tensor.numel() for tensor in stored.values()))
    assert (report.in_full, report.rows, report.bias) == (("model.multi_modal_projector",), {}, False)
    assert report.base["checkpoint"] == str(checkpoint)
    assert report.fingerprint is not None
    kinds = {kind.name: kind for kind in report.kinds}
    layers = [name for name in stored if name.endswith("mlp.down_proj.lora_A.weight")]
    assert kinds["down_proj"].modules == len(layers)
    updates = [2.0 * stored[name.replace("lora_A", "lora_B")] @ stored[name] for name in layers]
    assert kinds["down_proj"].norm == pytest.approx(sum(float(update.norm()) for update in updates) / len(layers))
    assert kinds["down_proj"].largest == pytest.approx(max(float(update.norm()) for update in updates))
    assert json.loads(json.dumps(report.as_dict()))["rank"] == 4


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        (Lora(rank=4, variant="dora", target="attention"), ("dora", 4, "attention")),
        (Lora(rank=4, variant="rslora", target=("v_proj", "up_proj")), ("rslora", 4, "up_proj, v_proj")),
        (Lora(rank=4, variant="pissa", target="mlp"), ("lora", 8, "mlp")),
        (Lora(rank=4, bias="lora"), ("lora", 4, "all-linear")),
    ],
)
def test_each_variant_is_described_and_valid(tune: Lora, expected: tuple[str, int, str], tmp_path: Path) -> None:
    """The base is a language model without projector and image rows."""
    folder = _adapter(tmp_path / "adapter", PARTS, tune)
    report = describe_adapter(folder)
    assert (report.variant, report.rank, report.target) == expected
    assert report.bias == (tune.bias == "lora")
    assert [len(rows) for rows in report.rows.values()] == [2]
    check = verify_adapter(folder, base=TINY_PARTS / "language_model")
    assert (check.base, check.checksums) == ("fingerprint", True)


def test_damage_is_reported(copy: Path, checkpoint: Path) -> None:
    assert verify_adapter(copy).base is None
    path = copy / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 0x10]) + whole[-8:])
    with pytest.raises(WeightsError, match="wrong checksum"):
        verify_adapter(copy, base=checkpoint)
    path.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors: not a readable file of weights"):
        verify_adapter(copy, base=checkpoint)
    path.unlink()
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
        verify_adapter(copy, base=checkpoint)


def _changed(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> None:
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "weights_checksums.json").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_all_errors_are_reported_at_once(copy: Path, checkpoint: Path) -> None:
    tensors = load_file(copy / "adapter_model.safetensors")
    del tensors["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight"]
    tensors[f"{LAYER}.lora_A.weight"] = torch.zeros(3, 256)
    tensors[f"{LAYER}.lora_B.weight"][0, 0] = torch.nan
    tensors["base_model.model.strange.weight"] = torch.zeros(2)
    _changed(copy, tensors, trainable_token_indices={"embed_tokens": [1]})
    with pytest.raises(WeightsError) as raised:
        verify_adapter(copy)
    text = str(raised.value)
    for message in (
        "layers.0.self_attn.q_proj: incomplete update (missing B)",
        "layers.0.mlp.down_proj: wrong shape (got A [3, 256]",
        "1 of 512 elements are NaN",
        "strange: not a tensor of this kind of adapter",
        "rows of the embeddings were trained, but they are missing",
    ):
        assert message in text
    assert len(raised.value.faults) == 5


def test_updates_of_whole_numbers_are_rejected(copy: Path, checkpoint: Path) -> None:
    """Numbers that were cut to integers would be merged silently."""
    tensors = load_file(copy / "adapter_model.safetensors")
    _changed(copy, {name: (100 * tensor).to(torch.int8) for name, tensor in tensors.items()})
    with pytest.raises(WeightsError, match="not floating-point numbers"):
        verify_adapter(copy)


def test_a_base_with_other_layers_or_other_values_is_rejected(copy: Path, checkpoint: Path) -> None:
    tensors = load_file(copy / "adapter_model.safetensors")
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.0." not in name}
    more = tensors | {name.replace("layers.0.", "layers.7."): tensor.clone() for name, tensor in tensors.items()}
    for changed, message in (
        (fewer, "modules of the base are missing from the adapter"),
        (more, "are not in the base"),
    ):
        _changed(copy, changed)
        with pytest.raises(WeightsError, match=r"different layers \(got layers .*, expected \d layers\)") as raised:
            verify_adapter(copy, base=checkpoint)
        assert message in str(raised.value)
    _changed(copy, tensors)
    other = shutil.copytree(checkpoint, copy.parent / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.language_model.layers.0.mlp.down_proj.weight"] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"fingerprint differs in model\.layers\.0\.mlp\.down_proj\.weight"):
        verify_adapter(copy, base=other)


def test_commands(copy: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["adapter", "show", str(copy)]) == 0
    shown = capsys.readouterr().out
    for message in ("lora, rank 4, alpha 8", "all-linear", "model.multi_modal_projector", str(checkpoint), "down_proj"):
        assert message in shown
    assert cli.main(["adapter", "show", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "all-linear"
    assert cli.main(["adapter", "verify", str(copy), "--base", str(checkpoint)]) == 0
    assert "the base matches by its fingerprint" in capsys.readouterr().out
    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert cli.main(["adapter", "verify", str(copy)]) == 2
    assert "wrong checksum" in capsys.readouterr().err
    assert cli.main(["adapter", "show", str(checkpoint)]) == 2
    assert "no adapter_config.json in this folder" in capsys.readouterr().err
