"""Merging adapters from disk to disk: equal to peft in memory for every variant, and into a delta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavar_peft import ModelConfig, apply_delta, build_model, cli, load_adapter, make_delta, merge_adapter
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.inference.chat import load_chat
from llavar_peft.models.tuning import merge_tuning
from llavar_peft.recipe.schema import Lora
from llavar_peft.weights.io.tensor_blocks import open_weights
from tests.weights.adapters import TINY_PARTS, save_moved_adapter

_VARIANTS = {
    "lora": Lora(rank=4, alpha=8, dropout=0.0),
    "rslora": Lora(rank=4, alpha=8, dropout=0.0, variant="rslora"),
    "pissa": Lora(rank=4, alpha=8, dropout=0.0, variant="pissa"),
    "dora": Lora(rank=4, alpha=8, dropout=0.0, variant="dora"),
    "attention only": Lora(rank=4, alpha=8, dropout=0.0, target="attention"),
    "two names": Lora(rank=4, alpha=8, dropout=0.0, target=("q_proj", "down_proj")),
    "with rows": Lora(rank=4, alpha=8, dropout=0.0, train_image_rows=True),
    "without projector": Lora(rank=4, alpha=8, dropout=0.0, train_projector=False),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVAR of ours, in fp32."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = ModelConfig(
        language_model=str(TINY_PARTS / "language_model"),
        vision_tower=str(TINY_PARTS / "vision_tower"),
        dtype="float32",
    )
    model, processor = build_model(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _save_adapter(folder: Path, checkpoint: Path, tune: Lora, *, seed: int = 0) -> Any:
    return save_moved_adapter(folder, ModelConfig(checkpoint=str(checkpoint), dtype="float32"), tune, seed=seed)


def _largest_difference(folder: Path, expected: dict[str, Tensor]) -> float:
    got = open_weights(folder)
    assert set(got) == set(expected)
    return max(float((got[name].float() - expected[name].float()).abs().max()) for name in expected)


@pytest.mark.parametrize("name", _VARIANTS)
def test_the_merge_equals_that_of_peft(name: str, checkpoint: Path, tmp_path: Path) -> None:
    wrapped = _save_adapter(tmp_path / "adapter", checkpoint, _VARIANTS[name])
    report = merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    expected = merge_tuning(wrapped).state_dict()
    assert report.tensors == len(expected)
    before = dict(open_weights(checkpoint))
    assert _largest_difference(checkpoint, expected) > 1e-2  # otherwise there was nothing to merge
    assert _largest_difference(tmp_path / "merged", expected) < 1e-6
    assert before["model.vision_tower.post_layernorm.weight"].equal(
        expected["model.vision_tower.post_layernorm.weight"]
    )


def test_the_merged_model_has_the_logits_of_the_adapter(checkpoint: Path, tmp_path: Path) -> None:
    wrapped = _save_adapter(tmp_path / "adapter", checkpoint, _VARIANTS["dora"])
    merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    chat = load_chat(tmp_path / "merged")
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=ids).logits
        assert torch.allclose(chat.engine.model(input_ids=ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_result_is_rounded_once(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    wrapped = _save_adapter(tmp_path / "adapter", checkpoint, _VARIANTS["lora"])
    merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    expected = merge_tuning(wrapped).state_dict()
    for name, tensor in open_weights(tmp_path / "merged").items():
        exact = expected[name].float()
        assert tensor.dtype == getattr(torch, dtype)
        step = torch.finfo(tensor.dtype).eps * exact.abs().clamp(min=torch.finfo(torch.float16).tiny)
        assert bool(((tensor.float() - exact).abs() <= step).all())
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["dtype"] == dtype


def test_several_adapters(checkpoint: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        _save_adapter(tmp_path / str(number), checkpoint, _VARIANTS["lora"], seed=number)
        merge_adapter(checkpoint, tmp_path / str(number), tmp_path / f"only{number}")
    both = [tmp_path / "1", tmp_path / "2"]
    base, one, two = (dict(open_weights(folder)) for folder in (checkpoint, tmp_path / "only1", tmp_path / "only2"))
    merge_adapter(checkpoint, both, tmp_path / "weighted", weights=[0.25, 2.0])
    expected = {name: base[name] + 0.25 * (one[name] - base[name]) + 2.0 * (two[name] - base[name]) for name in base}
    assert _largest_difference(tmp_path / "weighted", expected) < 1e-6
    merge_adapter(checkpoint, both, tmp_path / "sequence")
    merge_adapter(tmp_path / "only1", tmp_path / "2", tmp_path / "by hand", force=True)
    assert _largest_difference(tmp_path / "sequence", dict(open_weights(tmp_path / "by hand"))) < 1e-6
    with pytest.raises(ConfigError, match="one for each of 2 adapters"):
        merge_adapter(checkpoint, both, tmp_path / "three", weights=[1.0])


def test_an_adapter_of_another_shape_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    _save_adapter(tmp_path / "adapter", checkpoint, _VARIANTS["lora"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    first = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
    other = first.replace("mlp.down_proj", "self_attn.q_proj")
    changes = {
        "layers.9": {name.replace("layers.0", "layers.9"): tensor for name, tensor in tensors.items()},
        "layers.0.mlp.down_proj": {**tensors, first: torch.zeros(4, 7)},
        "missing A": {name: tensor for name, tensor in tensors.items() if name != first},
        "q_proj.lora_A": {**tensors, other: torch.full((4, 128), torch.nan)},
        "strange": {**tensors, "strange.weight": torch.zeros(3)},
    }
    for named, changed in changes.items():
        save_file(changed, path)
        with pytest.raises(WeightsError) as raised:
            merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / "out")
        assert named in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    _save_adapter(tmp_path / "adapter", checkpoint, _VARIANTS["lora"])
    merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / "other")  # the same shapes, other values
    for attempt in (
        lambda: merge_adapter(tmp_path / "other", tmp_path / "adapter", tmp_path / "out"),
        lambda: make_delta(
            TINY_PARTS / "language_model", tmp_path / "other", tmp_path / "out", adapter=tmp_path / "adapter"
        ),
        lambda: load_chat(tmp_path / "other", adapter=tmp_path / "adapter"),
        lambda: load_adapter(
            build_model(ModelConfig(checkpoint=str(tmp_path / "other"), dtype="float32"))[0], tmp_path / "adapter"
        ),
    ):
        with pytest.raises(WeightsError, match=r"not the base that .* was trained on"):
            attempt()
    assert not (tmp_path / "out").exists()
    load_chat(checkpoint, adapter=tmp_path / "adapter")


def test_load_adapter(checkpoint: Path, tmp_path: Path) -> None:
    wrapped = _save_adapter(tmp_path / "adapter", checkpoint, _VARIANTS["dora"])
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32")
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad():
        loaded = load_adapter(build_model(base)[0], tmp_path / "adapter")
        assert torch.equal(loaded(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits)
    assert not [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    fewer = build_model(base)[0]
    del fewer.model.language_model.layers[-1]
    with pytest.raises(WeightsError, match=r"unexpected tensors: .*layers\.3"):
        load_adapter(fewer, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        load_adapter(build_model(base)[0], checkpoint)


def test_from_adapter_to_delta_without_the_merged_model(checkpoint: Path, tmp_path: Path) -> None:
    """The delta is bit-equal to that of the merged model, and applied to the base it gives the same logits."""
    _save_adapter(tmp_path / "adapter", checkpoint, _VARIANTS["lora"])
    llama = TINY_PARTS / "language_model"
    make_delta(llama, checkpoint, tmp_path / "delta", adapter=tmp_path / "adapter")
    merge_adapter(checkpoint, tmp_path / "adapter", tmp_path / "merged", dtype="float16")
    make_delta(llama, tmp_path / "merged", tmp_path / "from merged")
    one, other = open_weights(tmp_path / "delta"), open_weights(tmp_path / "from merged")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)

    apply_delta(llama, tmp_path / "delta", tmp_path / "applied")
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    tower = str(TINY_PARTS / "vision_tower")
    with torch.no_grad():
        applied = (
            load_chat(tmp_path / "applied", vision_tower=tower, dtype="float32").engine.model(input_ids=ids).logits
        )
        merged = load_chat(tmp_path / "merged", dtype="float32").engine.model(input_ids=ids).logits
    assert torch.allclose(applied, merged, atol=2e-2)
    assert applied.argmax(-1).equal(merged.argmax(-1))


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save_adapter(tmp_path / "adapter", checkpoint, _VARIANTS["lora"])
    arguments = ["--base", str(checkpoint), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]
    assert cli.main(["merge", *arguments]) == 0
    assert str(tmp_path / "merged") in capsys.readouterr().out
    assert cli.main(["merge", *arguments]) == 2
    assert "exists already" in capsys.readouterr().err
    wrong = ["--base", str(checkpoint), "--adapter", str(checkpoint), "--out", str(tmp_path / "other")]
    assert cli.main(["merge", *wrong]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
