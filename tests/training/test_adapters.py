"""LoRA as stage 1, as stage 2 and alone, on any base: the saved adapter holds what was trained and loads anywhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from llavar_peft import (
    Lora,
    ModelConfig,
    OptimConfig,
    Recipe,
    Trainer,
    apply_delta,
    build_model,
    load_adapter,
    load_recipe,
    make_delta,
    merge_adapter,
)
from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.inference.chat import load_chat
from llavar_peft.models.tuning import apply_tuning, merge_tuning, trained_names
from llavar_peft.recipe.schema import Quantization
from tests.inference.reference import greedy_answers

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45]])
_STORED = {None: "Linear", "nf4": "Linear4bit", "int8": "Linear8bitLt"}


def _lora(recipe: Recipe, *, only: bool = False, quantize: Quantization | None = None, **tune: Any) -> Recipe:
    """The tiny recipe with LoRA as its second stage, or as its only one."""
    first, second = (dataclasses.replace(stage, max_steps=2) for stage in recipe.stages)
    second = dataclasses.replace(second, tune=Lora(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, **tune}))
    model = dataclasses.replace(recipe.model, quantize=quantize)
    return dataclasses.replace(recipe, model=model, stages=(second,) if only else (first, second))


def _train(recipe: Recipe) -> tuple[Trainer, Path]:
    model, processor = build_model(recipe.model, seed=recipe.seed)
    trainer = Trainer(model, processor, recipe)
    return trainer, trainer.train()


def _logits(model: Any, ids: torch.Tensor = IDS, pixels: torch.Tensor | None = None) -> torch.Tensor:
    inputs = {"input_ids": ids} | ({"pixel_values": pixels} if pixels is not None else {})
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_an_adapter_holds_everything_and_answers_as_in_training(
    quantize: Quantization | None, tiny_recipe: Recipe, tiny_data: Path
) -> None:
    recipe = _lora(tiny_recipe, quantize=quantize)
    trainer, result = _train(recipe)
    assert result.name == "adapter"
    trained = trained_names(trainer.model)
    assert not [name for name in trained if "vision_tower" in name]
    stored = load_file(result / "adapter_model.safetensors")
    assert len(stored) == len(trained)
    assert [name for name in stored if "multi_modal_projector" in name]

    base = trainer.model.get_base_model()
    kinds = {name: type(module).__name__ for name, module in base.named_modules()}
    assert kinds["model.language_model.layers.0.self_attn.q_proj.base_layer"] == _STORED[quantize]
    assert {kinds[name] for name in kinds if "vision_tower" in name and name.endswith("_proj")} == {"Linear"}
    assert kinds["model.multi_modal_projector.modules_to_save.default"] == "LinearProjector"
    assert (kinds["model.language_model.embed_tokens"], kinds["lm_head"]) == ("Embedding", "LossHead")

    chat = load_chat(result)
    processor = trainer.processor
    ids = processor.encode_question("What does the sign say?")
    image = sorted((tiny_data / "images").iterdir())[0]
    pixels = prepare_image(image, "pad", processor)[None]
    expected = _logits(trainer.model, ids, pixels)
    # On a quantized base, stage 1's rows and projector are applied to the source before it is quantized again.
    torch.testing.assert_close(_logits(chat.engine.model, ids, pixels), expected, atol=1e-5, rtol=1e-5)
    answer = chat.ask(image, "What does the sign say?", temperature=0.0, max_new_tokens=4)
    assert [answer] == greedy_answers(
        chat.engine.base_model, chat.engine.processor, ["What does the sign say?"], [image], max_new_tokens=4
    )
    plain, _ = build_model(trainer.base, seed=recipe.seed)
    opened = PeftModel.from_pretrained(plain, str(result))
    torch.testing.assert_close(_logits(opened, ids, pixels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_from_the_parts_only_the_new_rows_of_the_embeddings_are_trained(tiny_recipe: Recipe) -> None:
    recipe = _lora(tiny_recipe, only=True)
    optim = OptimConfig(learning_rate=1e-3, projector_learning_rate=2e-3, rows_learning_rate=5e-3, weight_decay=0.01)
    stage = dataclasses.replace(recipe.stages[0], optim=optim)
    recipe = dataclasses.replace(recipe, stages=(stage,))
    trainer, result = _train(recipe)
    rows = [
        tensor for name, tensor in load_file(result / "adapter_model.safetensors").items() if "embed_tokens" in name
    ]
    assert [list(tensor.shape) for tensor in rows] == [[2, 128]]
    base, processor = build_model(recipe.model, seed=recipe.seed)
    assert not torch.equal(rows[0], base.get_input_embeddings().weight[-2:])
    ids = torch.cat([IDS, torch.tensor([processor.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])])], dim=1)
    expected = _logits(trainer.model, ids)
    torch.testing.assert_close(_logits(load_chat(result).engine.model, ids), expected, atol=1e-5, rtol=1e-5)
    embeddings = base.get_input_embeddings().weight.detach().clone()
    merged = merge_tuning(load_adapter(base, result)).get_input_embeddings().weight
    assert torch.equal(merged[:-2], embeddings[:-2])
    assert torch.equal(merged[-2:], rows[0])

    lines = [json.loads(line) for line in (Path(recipe.output_dir) / stage.name / "metrics.jsonl").open()]
    for line in lines:
        assert list(line["learning_rates"]) == ["adapters", "projector", "rows"]
        rate = line["learning_rate"]
        assert line["learning_rates"] == pytest.approx({"adapters": rate, "projector": 2 * rate, "rows": 5 * rate})


@pytest.mark.slow
def test_lora_alone_on_a_released_checkpoint(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """A released folder has no tower, and its rows are already trained."""
    model, processor = build_model(tiny_recipe.model, seed=1)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    assert tiny_recipe.model.language_model is not None
    make_delta(tiny_recipe.model.language_model, tmp_path / "ours", tmp_path / "delta")
    apply_delta(tiny_recipe.model.language_model, tmp_path / "delta", tmp_path / "released")
    config = ModelConfig(
        checkpoint=str(tmp_path / "released"), vision_tower=tiny_recipe.model.vision_tower, dtype="float32"
    )
    recipe = dataclasses.replace(_lora(tiny_recipe, only=True, target="attention"), model=config)
    trainer, result = _train(recipe)
    stored = load_file(result / "adapter_model.safetensors")
    assert not [name for name in stored if "embed_tokens" in name or "mlp" in name]
    torch.testing.assert_close(_logits(load_adapter(config, result)), _logits(trainer.model), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_second_adapter_belongs_to_the_model_with_the_first_one_merged(tiny_recipe: Recipe) -> None:
    recipe = _lora(tiny_recipe, only=True)
    again = dataclasses.replace(recipe.stages[0], name="again")
    trainer, result = _train(dataclasses.replace(recipe, stages=(*recipe.stages, again)))
    assert not [
        name for name in trained_names(trainer.model) if "trainable_tokens" in name
    ]  # the first adapter has trained the rows
    chat = load_chat(result)
    torch.testing.assert_close(_logits(chat.engine.model), _logits(trainer.model), atol=1e-5, rtol=1e-5)
    assert json.loads((result / "base.json").read_text())["checkpoint"].endswith("stage2/model")


@pytest.mark.slow
def test_biases_are_trained_saved_and_never_merged(tiny_recipe: Recipe) -> None:
    trainer, result = _train(_lora(tiny_recipe, bias="lora", target=("q_proj", "v_proj")))
    stored = load_file(result / "adapter_model.safetensors")
    biases = [tensor for name, tensor in stored.items() if name.endswith("lora_B.bias")]
    assert len(biases) == len([name for name in stored if name.endswith("lora_A.weight")])
    assert all(tensor.abs().max() > 0 for tensor in biases)
    torch.testing.assert_close(_logits(load_chat(result).engine.model), _logits(trainer.model), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="LLaMA's layers have no biases"):
        merge_adapter(json.loads((result / "base.json").read_text())["checkpoint"], result, result.parent / "merged")


@pytest.mark.slow
def test_the_model_card_describes_the_adapter(tiny_recipe: Recipe) -> None:
    recipe = _lora(tiny_recipe, variant="rslora")
    _, result = _train(recipe)
    text = (result / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert (fields["library_name"], fields["base_model"]) == ("peft", "model")
    assert {"rslora", "llavar"} <= set(fields["tags"])
    assert str(Path(recipe.output_dir)) not in text  # the card is used on other machines
    for expected in ("rslora, rank 4, alpha 8", "`model.multi_modal_projector` in full", "held-out loss", "PeftModel"):
        assert expected in body
    assert load_recipe(result / "recipe.yaml") == recipe
    assert f"# Trained by stage: {recipe.stages[1].name}\n" in (result / "recipe.yaml").read_text()


def test_adapters_of_a_half_precision_base_train_in_float32(tiny_recipe: Recipe) -> None:
    model, _ = build_model(dataclasses.replace(tiny_recipe.model, dtype="bfloat16"))
    wrapped = apply_tuning(model, Lora(rank=4, train_image_rows=True))
    dtypes = {parameter.dtype for parameter in wrapped.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32}


@pytest.mark.slow
def test_another_base_is_rejected_and_left_unchanged(tiny_recipe: Recipe, tmp_path: Path) -> None:
    _, result = _train(_lora(tiny_recipe, only=True))
    other, processor = build_model(tiny_recipe.model)
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(WeightsError, match=r"not the base that .* was trained on"):
        load_adapter(tmp_path / "other", result)
    load_adapter(tmp_path / "other", result, force=True)
    other.config.text_config.num_hidden_layers -= 1
    with pytest.raises(WeightsError, match=r"different layers \(got (\d) layers, expected (?!\1)\d layers\)"):
        load_adapter(other, result, force=True)
    assert not [name for name, _ in other.named_modules() if "lora" in name]
    with pytest.raises(ConfigError, match="without adapters"):
        load_adapter(load_chat(result).engine.model, result, force=True)
