"""A model whose weights are read late is the model that is read at once, and needs no memory before."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavar_peft import Full, Lora, ModelConfig, Projector, build_model
from llavar_peft.errors import WeightsError
from llavar_peft.models.build_model import build_pending_model
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Tune
from llavar_peft.training.save_weights import load_full
from llavar_peft.weights.io.joined_rows import JoinedRows, first_rows, mean_row, whole
from tests.parts.tiny_parts import save_language_model, save_tower

TUNES: dict[str, Tune] = {
    "projector": Projector(),
    "full": Full(),
    "lora": Lora(rank=4, alpha=8, train_image_rows=True),
    "dora": Lora(rank=4, alpha=8, variant="dora"),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_parts() -> ModelConfig:
    tiny = Path(str(files("llavar_peft") / "assets/tiny"))
    return ModelConfig(
        language_model=str(tiny / "language_model"), vision_tower=str(tiny / "vision_tower"), dtype="float32"
    )


@pytest.fixture(scope="module")
def float16(tiny_parts: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A checkpoint in float16, to be rounded to bfloat16."""
    folder = tmp_path_factory.mktemp("float16")
    model, processor = build_model(tiny_parts)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return ModelConfig(checkpoint=str(folder), dtype="bfloat16")


def test_tied_embeddings_stay_one_parameter(tmp_path: Path) -> None:
    """As on one GPU, where weights are read late as well."""
    parts = ModelConfig(
        language_model=str(save_language_model("qwen2", tmp_path / "qwen2")),
        vision_tower=str(save_tower("siglip", tmp_path / "siglip")),
    )
    pending, _ = build_pending_model(parts)
    assert pending.pending_weights is not None
    pending.pending_weights.fill(pending, CPU)
    assert pending.lm_head.weight is pending.get_input_embeddings().weight
    _assert_same(pending, build_model(parts)[0])


def _state(model: Any) -> dict[str, tuple[torch.Tensor, bool]]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (tensor.detach(), tensor.requires_grad) for name, tensor in named}


def _assert_same(model: Any, other: Any) -> None:
    ours, theirs = _state(model), _state(other)
    assert ours.keys() == theirs.keys()
    for name, (tensor, trained) in theirs.items():
        assert (ours[name][1], ours[name][0].dtype) == (trained, tensor.dtype), name
        assert torch.equal(ours[name][0], tensor), name


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("source", ["tiny_parts", "float16"])
def test_tuning_before_reading_gives_the_same_tensors(source: str, tune: str, request: pytest.FixtureRequest) -> None:
    config = request.getfixturevalue(source)
    tuned = []
    for build in (build_model, build_pending_model):
        model, _ = build(config, seed=5)
        torch.manual_seed(7)
        tuned.append((model, apply_tuning(model, TUNES[tune])))
    (_, expected), (model, pending) = tuned
    assert model.pending_weights is not None
    assert any(parameter.is_meta for parameter in pending.parameters())
    model.pending_weights.fill(pending, CPU)
    _assert_same(pending, expected)
    assert pending.training == expected.training


def test_a_checkpoint_replaces_what_is_pending_without_rounding(float16: ModelConfig, tmp_path: Path) -> None:
    trained = apply_tuning(build_model(float16)[0], Full())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1e-4)
    trained.save_pretrained(tmp_path)
    model = apply_tuning(build_pending_model(float16)[0], Full())
    load_full(model, tmp_path)
    assert model.pending_weights is not None
    model.pending_weights.fill(model, CPU)
    _assert_same(model, trained)


def test_an_error_names_the_tensor_before_anything_is_read(float16: ModelConfig, tmp_path: Path) -> None:
    source = Path(float16.checkpoint or "")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as raised:
        build_pending_model(ModelConfig(checkpoint=str(tmp_path)))
    assert "model.language_model.norm.weight" in str(raised.value)
    assert "lm_head.weight (got" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [72, 513, 1031, 1536])
def test_the_mean_in_parts_is_the_mean_of_the_whole(width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(997, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(mean_row(rows), rows.float().mean(dim=0, keepdim=True))


def test_joined_rows_are_the_rows_of_their_parts() -> None:
    parts = torch.randn(5, 3).half(), torch.randn(1, 3), torch.randn(2, 3).bfloat16()
    expected = torch.cat([part.float() for part in parts])
    joined = JoinedRows(*parts)
    assert joined.shape == (8, 3)
    assert joined.numel() == 24
    for start in range(9):
        for stop in range(start, 9):
            assert torch.equal(joined.rows(start, stop), expected[start:stop])
        assert torch.equal(whole(JoinedRows(*first_rows(joined, start))), expected[:start])
