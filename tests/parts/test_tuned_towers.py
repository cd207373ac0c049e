"""Training of vision towers of many kinds: what gets gradients, packed rows, adapters, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llavar_peft import Full, Lora, ModelConfig, build_model
from llavar_peft.errors import ConfigError
from llavar_peft.models.packed_attention import enable_packing, packed_arguments
from llavar_peft.models.tuning import apply_tuning, part_of, trained_names
from llavar_peft.models.vision_tower import tower_layers
from llavar_peft.training.stage_trainer import StageTrainer
from tests.parts.tiny_parts import TOWERS

Folder = Callable[[str], str]
FULL, LORA = Full(train_tower=True), Lora(rank=4, alpha=8, dropout=0.0, tower_rank=2)
QUESTIONS = ("What is written on the sign? " * 2, "The total?")


def _tuned(tune: Full | Lora, **parts: Any) -> tuple[Any, Any, Any]:
    """Return a model in training whose adapters are not zero, the model inside, and the processor."""
    model, processor = build_model(ModelConfig(**parts))
    trained = apply_tuning(model, tune)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trained.train(), model, processor


def _pass(trained: Any, rows: list[Tensor], pixels: Tensor | None, **arguments: Any) -> Tensor:
    targets = torch.cat([torch.cat([row[1:], torch.tensor([-100])]) for row in rows])[None]
    loss: Tensor = trained(input_ids=torch.cat(rows)[None], pixel_values=pixels, targets=targets, **arguments).loss
    return loss


def _gradients(trained: Any) -> Iterator[tuple[str, Tensor | None]]:
    yield from ((name, one.grad) for name, one in trained.named_parameters() if one.requires_grad)


@pytest.mark.parametrize(
    ("kind", "tune"),
    [*((kind, FULL) for kind in TOWERS if kind != "siglip"), ("clip_vision_model", LORA), ("aimv2_vision_model", LORA)],
    ids=str,
)
def test_packed_rows_have_the_gradients_of_single_ones_also_in_the_tower(
    kind: str, tune: Full | Lora, language_model: Folder, tower: Folder
) -> None:
    trained, model, processor = _tuned(tune, language_model=language_model("qwen2"), vision_tower=tower(kind))
    assert enable_packing(model)
    rows = [processor.encode_question(text)[0] for text in QUESTIONS]
    pixels = torch.randn(2, 3, processor.image_side, processor.image_side)
    arguments = packed_arguments(tuple(map(len, rows)), model, torch.device("cpu"))
    loss = _pass(trained, rows, pixels, **arguments)
    loss.backward()
    packed = {name: grad.clone() for name, grad in _gradients(trained) if grad is not None}
    trained.zero_grad()
    alone = [_pass(trained, [row], pixels[number : number + 1]) for number, row in enumerate(rows)]
    torch.stack(alone).sum().backward()
    assert float(loss.detach()) == pytest.approx(sum(float(one.detach()) for one in alone), rel=1e-5)
    for name, gradient in _gradients(trained):
        assert gradient is not None, name
        scale = float(gradient.abs().sum()) / max(gradient.numel(), 1)  # DINOv3 has an empty tensor
        assert torch.allclose(packed[name], gradient, atol=1e-4 * max(scale, 1e-3)), name
    in_tower = [name for name in packed if part_of(name) == "tower"]
    assert len(in_tower) >= 2 * 6
    assert any(packed[name].any() for name in in_tower)


@pytest.mark.parametrize(("kind", "tune"), [("clip_vision_model", LORA), ("siglip", FULL), ("dinov2", FULL)])
def test_what_is_computed_of_the_tower_is_trained_and_nothing_else(
    kind: str, tune: Full | Lora, language_model: Folder, tower: Folder
) -> None:
    """Of three layers, -2 computes two; DINOv2's mask token and SigLIP's head never get a gradient."""
    trained, model, _ = _tuned(tune, language_model=language_model("qwen2"), vision_tower=tower(kind))
    names = [name for name in trained_names(trained) if part_of(name) == "tower"]
    numbers = {name.partition("ayer")[2].partition(".")[2].partition(".")[0] for name in names if "ayer" in name}
    assert {"0", "1"} <= numbers
    assert not any(word in name for name in names for word in ("layers.2", "layer.2", "mask_token", "head", "post_"))
    assert len(tower_layers(model.model.vision_tower)) == 3
    assert model.config.tuned_vision_tower
    assert {one.dtype for name, one in trained.named_parameters() if name in names} == {torch.float32}


@pytest.mark.parametrize("tune", [FULL, LORA], ids=["full", "lora"])
def test_a_batch_of_text_gives_every_trained_tensor_a_gradient(
    tune: Full | Lora, language_model: Folder, tower: Folder
) -> None:
    """Otherwise processes with images would wait for those without, and momentum would depend on their number."""
    trained, _, _ = _tuned(tune, language_model=language_model("qwen2"), vision_tower=tower("siglip"))
    _pass(trained, [torch.arange(5, 15)], None).backward()
    assert [name for name, gradient in _gradients(trained) if gradient is None] == []
    assert all(not gradient.any() for name, gradient in _gradients(trained) if part_of(name) == "tower")  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "tune"), [("clip_vision_model", LORA), ("siglip", FULL)])
def test_recomputed_activations_give_the_same_gradients(
    kind: str, tune: Full | Lora, language_model: Folder, tower: Folder
) -> None:
    found = []
    for recompute in (False, True):
        trained, model, processor = _tuned(tune, language_model=language_model("qwen2"), vision_tower=tower(kind))
        calls = []
        # Hooks of the layer itself are not called again.
        inside = next(tower_layers(model.model.vision_tower)[0].children())
        inside.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if recompute:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        _pass(trained, [processor.encode_question(QUESTIONS[0])[0]], torch.ones(1, 3, 56, 56)).backward()
        assert len(calls) == 1 + recompute
        found.append(dict(_gradients(trained)))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.parametrize(
    ("kind", "tune", "layer"), [("siglip", FULL, -1), ("dinov3_vit", FULL, -2), ("aimv2_vision_model", LORA, -2)]
)
def test_a_half_precision_base_is_trained_in_float32_under_autocast(
    kind: str, tune: Full | Lora, layer: int, language_model: Folder, tower: Folder
) -> None:
    trained, _, processor = _tuned(
        tune,
        language_model=language_model("qwen2"),
        vision_tower=tower(kind),
        vision_feature_layer=layer,
        dtype="bfloat16",
    )
    pixels = torch.randn(1, 3, processor.image_side, processor.image_side)
    row = processor.encode_question(QUESTIONS[0])[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = _pass(trained, [row], pixels)
    loss.backward()
    assert {None if gradient is None else gradient.dtype for _, gradient in _gradients(trained)} == {torch.float32}
    with torch.no_grad():  # the probe calls the model without autocast
        assert torch.isfinite(trained.eval()(input_ids=row[None], pixel_values=pixels).logits).all()


@pytest.mark.parametrize("tune", [Full(), LORA, FULL], ids=["frozen", "lora", "full"])
def test_the_features_in_training_do_not_depend_on_chance(
    tune: Full | Lora, language_model: Folder, tower: Folder
) -> None:
    """In training mode, transformers moves DINOv3's positions at random."""
    trained, model, _ = _tuned(tune, language_model=language_model("qwen2"), vision_tower=tower("dinov3_vit"))
    pixels = torch.randn(1, 3, 56, 56)
    first, second = (model.model.get_image_features(pixels).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, model.eval().model.get_image_features(pixels).last_hidden_state)
    del trained


def test_a_tower_of_which_no_layer_is_computed_gets_no_adapters(language_model: Folder, tower: Folder) -> None:
    parts = ModelConfig(language_model=language_model("qwen2"), vision_tower=tower("siglip"), vision_feature_layer=0)
    with pytest.raises(ConfigError, match=r"tune\.tower_rank: no layers of the vision tower.*Fix"):
        apply_tuning(build_model(parts)[0], LORA)


@pytest.mark.parametrize("kind", [kind for kind in TOWERS if kind != "siglip"])
def test_norms_and_other_vectors_of_a_tower_have_no_weight_decay(
    kind: str, language_model: Folder, tower: Folder
) -> None:
    trained, *_ = _tuned(FULL, language_model=language_model("qwen2"), vision_tower=tower(kind))
    decayed = StageTrainer.__new__(StageTrainer).get_decay_parameter_names(trained)
    sizes = {name: one.ndim for name, one in trained.named_parameters(remove_duplicate=False)}
    assert {name for name in decayed if sizes.get(name) == 1} == set()
    assert all(name in decayed for name, size in sizes.items() if size == 2)
