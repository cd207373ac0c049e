"""Language models x towers x projectors x ways to tune, each pair at least once: train, save, merge, export, answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, TrainerState

from llavar_peft import (
    DataConfig,
    Full,
    Lora,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    Projector,
    Recipe,
    Stage,
    Trainer,
    build_model,
    export,
    load_adapter,
    merge_adapter,
)
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.errors import ConfigError, InterruptedRunError
from llavar_peft.models.tuning import apply_tuning, merge_tuning
from tests.parts.tiny_parts import LANGUAGE_MODELS

Folder = Callable[[str], str]
TOWERS = ("clip_vision_model", "siglip", "dinov2_with_registers", "aimv2_vision_model")
PROJECTORS = ("linear", "mlp2x_gelu")
LORA = Lora(rank=4, alpha=8, dropout=0.0)
TUNES = (Projector(), Full(), LORA)
# Each tower, projector and tuning meets each language model.
PAIRS = [
    (kind, tower, projector, tune)
    for (kind, tower), projector, tune in zip(
        product(LANGUAGE_MODELS, TOWERS), cycle(PROJECTORS), cycle((*TUNES, LORA, Full())), strict=False
    )
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, 14, SynthSettings(style="plain", seed=7, task="question"))
    records, images = str(folder / "records.json"), str(folder / "images")
    return DataConfig(records=records, images=images, holdout=2, workers=0)


@pytest.mark.parametrize(("kind", "tower_kind", "projector", "tune"), PAIRS)
def test_two_steps_and_a_merge_in_memory(
    kind: str, tower_kind: str, projector: str, tune: Projector | Full | Lora, language_model: Folder, tower: Folder
) -> None:
    """Two steps change what is trained and nothing else, lower the loss, and survive the merge."""
    model, processor = build_model(
        ModelConfig(
            language_model=language_model(kind),
            vision_tower=tower(tower_kind),
            projector_type=projector,  # type: ignore[arg-type]
        )
    )
    frozen = {name: one.detach().clone() for name, one in model.model.vision_tower.named_parameters()}
    inputs = processor(images=Image.new("RGB", (90, 60), (200, 30, 0)), text="<image>", return_tensors="pt")
    ids = processor.encode_question("What is written?")
    targets = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    trained = apply_tuning(model, tune)
    optimizer = torch.optim.SGD([one for one in trained.parameters() if one.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = trained(input_ids=ids, pixel_values=inputs["pixel_values"], targets=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    with torch.no_grad():
        before = trained(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        after = merge_tuning(trained)(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    assert torch.allclose(before, after, atol=1e-3)
    assert all(torch.equal(one, frozen[name]) for name, one in model.model.vision_tower.named_parameters())


def _recipe(model: ModelConfig, data: DataConfig, out: Path, *tunes: Projector | Full | Lora, steps: int = 2) -> Recipe:
    stages = tuple(
        Stage(
            name=f"stage{number}",
            data=data,
            tune=tune,
            optim=OptimConfig(learning_rate=1e-3),
            max_steps=steps,
            global_batch_size=4,
            micro_batch_size=2,
            max_length=512,
            precision="fp32",
            probe=ProbeConfig(images=1, max_new_tokens=2),
        )
        for number, tune in enumerate(tunes)
    )
    return Recipe(model=model, stages=stages, output_dir=str(out), seed=3)


def _train(recipe: Recipe) -> None:
    model, processor = build_model(recipe.model)
    Trainer(model, processor, recipe).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tower_kind", "projector"),
    [("qwen2", "siglip", "mlp2x_gelu"), ("gemma3_text", "clip_vision_model", "linear")],
)
def test_both_stages_then_an_adapter_then_a_merge_then_stock_transformers(
    kind: str, tower_kind: str, projector: str, language_model: Folder, tower: Folder, data: DataConfig, tmp_path: Path
) -> None:
    parts = ModelConfig(
        language_model=language_model(kind),
        vision_tower=tower(tower_kind),
        projector_type=projector,  # type: ignore[arg-type]
    )
    _train(_recipe(parts, data, tmp_path / "full", Projector(), Full()))
    checkpoint = str(tmp_path / "full" / "model")
    _train(_recipe(ModelConfig(checkpoint=checkpoint), data, tmp_path / "lora", LORA))
    adapter = tmp_path / "lora" / "adapter"

    report = merge_adapter(base=checkpoint, adapter=adapter, out=tmp_path / "merged")
    assert report.gaps["result"].relative < 1e-4
    merged, processor = build_model(ModelConfig(checkpoint=str(tmp_path / "merged")))
    unmerged = load_adapter(checkpoint, adapter)
    pixels = processor(images=Image.new("RGB", (90, 60), (0, 90, 200)), text="<image>", return_tensors="pt")
    ids = processor.encode_question("What is written on the sign?")
    inputs = {"input_ids": ids, "pixel_values": pixels["pixel_values"]}
    with torch.no_grad():
        logits = merged(**inputs).logits
        assert torch.allclose(logits, unmerged(**inputs).logits, atol=1e-4)

    export(tmp_path / "merged", tmp_path / "stock", to="hf-llava")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock", dtype="float32").eval()
    their_processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is written on the sign?"}]}
    ]
    text = their_processor.apply_chat_template(messages, add_generation_prompt=True)
    theirs = their_processor(
        images=[Image.new("RGB", (90, 60), (0, 90, 200))], text=[text], return_tensors="pt", add_special_tokens=False
    )
    assert torch.equal(theirs["input_ids"], ids)
    assert torch.allclose(theirs["pixel_values"], inputs["pixel_values"], atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(stock(**theirs).logits, logits, atol=1e-4)
    again, _ = build_model(ModelConfig(checkpoint=str(tmp_path / "stock"), dtype="float32"))
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits, logits, atol=1e-4)


def test_a_tower_with_registers_is_not_exported_to_stock_llava(
    language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    model, processor = build_model(
        ModelConfig(language_model=language_model("olmo2"), vision_tower=tower("dinov2_with_registers"))
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="one position of the tower at most"):
        export(tmp_path / "model", tmp_path / "stock", to="hf-llava")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class _StopAt(TrainerCallback):
    """Interrupts the run after a step, as Ctrl-C does."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "quantize", "tune", "result"),
    [("qwen3", "nf4", LORA, "adapter/adapter_model.safetensors"), ("qwen2", None, Full(), "model/model.safetensors")],
)
def test_a_resumed_run_is_bit_exact(
    kind: str,
    quantize: Any,
    tune: Full | Lora,
    result: str,
    language_model: Folder,
    tower: Folder,
    data: DataConfig,
    tmp_path: Path,
) -> None:
    """Also with tied embeddings, of which a checkpoint holds one copy (Qwen 2)."""
    parts = ModelConfig(language_model=language_model(kind), vision_tower=tower("dinov2"), quantize=quantize)
    whole, halved = (_recipe(parts, data, tmp_path / name, tune, steps=3) for name in ("whole", "halved"))
    _train(whole)
    with pytest.raises(InterruptedRunError):
        Trainer(*build_model(parts), halved, callbacks=(_StopAt(),)).train()
    _train(halved)
    files = (tmp_path / name / result for name in ("whole", "halved"))
    expected, resumed = map(load_file, files)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
