"""Language models x towers x projectors x ways to tune, each pair of values at least once: all that parts promise.

They are encoded, trained by ``Trainer``, resumed, packed, saved, loaded, merged and exported, and answer in stock
``transformers``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
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
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.training_dataset import Collator, TrainingDataset
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.errors import ConfigError
from llavar_peft.inference.batch_decoder import answer_all
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import PromptImage, Request
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.packed_attention import disable_packing, enable_packing
from llavar_peft.models.tuning import apply_tuning, is_quantized
from llavar_peft.training.stage_records import stage_records
from llavar_peft.training.supervised_loss import supervised_loss
from tests.parts.tiny_parts import LANGUAGE_MODELS

Folder = Callable[[str], str]
TOWERS = ("clip_vision_model", "siglip", "dinov2", "aimv2_vision_model")
PROJECTORS = ("linear", "mlp2x_gelu")
LORA = Lora(rank=4, alpha=8, dropout=0.0)
TUNES: dict[str, Projector | Full | Lora] = {"projector": Projector(), "full": Full(), "lora": LORA, "qlora": LORA}
QUESTION = "What is written on the sign?"
PAIRS = [
    (kind, tower, PROJECTORS[(row // len(TOWERS) + column) % 2], tuple(TUNES)[(row + column) % len(TUNES)])
    for (row, kind), (column, tower) in product(enumerate(LANGUAGE_MODELS), enumerate(TOWERS))
]
# The tower with which each language model is resumed: all towers, projectors and ways to tune occur.
RESUMED = {kind: TOWERS[row // 2 % len(TOWERS)] for row, kind in enumerate(LANGUAGE_MODELS)}
# Unless LLAVAR_PARTS is "all", each language model is tried with this tower and one other.
TRIED = [
    pair
    for pair in PAIRS
    if os.environ.get("LLAVAR_PARTS") == "all" or TOWERS.index(pair[1]) // 2 == TOWERS.index(RESUMED[pair[0]]) // 2
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, 14, SynthSettings(style="plain", seed=7, task="question"))
    records, images = str(folder / "records.json"), str(folder / "images")
    return DataConfig(records=records, images=images, holdout=0, workers=0)


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
            save_every_steps=1,
            probe=ProbeConfig(images=1, max_new_tokens=2),
        )
        for number, tune in enumerate(tunes)
    )
    return Recipe(model=model, stages=stages, output_dir=str(out), seed=3)


class _CopyAtFirstSave(TrainerCallback):  # type: ignore[misc]
    """Copies the run's folder when the first step is saved: what a run leaves that is killed then."""

    def __init__(self, run: Path, copy: Path) -> None:
        self.run, self.copy = run, copy

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            shutil.copytree(self.run, self.copy)


def _train(recipe: Recipe, *callbacks: TrainerCallback) -> Trainer:
    trainer = Trainer(*build_model(recipe.model), recipe, callbacks=callbacks)
    trainer.train()
    return trainer


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = model.eval()(**inputs).logits
    return found


def test_each_pair_of_values_occurs() -> None:
    for one, other in combinations(range(4), 2):
        values = [{pair[position] for pair in PAIRS} for position in (one, other)]
        assert {(pair[one], pair[other]) for pair in PAIRS} == set(product(*values))
    assert {pair[1::2] for pair in TRIED} == set(product(TOWERS, TUNES))
    assert {pair[::2] for pair in TRIED} == set(product(LANGUAGE_MODELS, PROJECTORS))
    resumed = [pair for pair in TRIED if pair[1] == RESUMED[pair[0]]]
    assert [len({pair[position] for pair in resumed}) for position in range(4)] == [9, 4, 2, 4]


@pytest.mark.parametrize(("kind", "tower_kind", "projector", "tuning"), TRIED)
def test_everything_that_is_promised_of_parts(
    kind: str,
    tower_kind: str,
    projector: Any,
    tuning: str,
    language_model: Folder,
    tower: Folder,
    data: DataConfig,
    tmp_path: Path,
) -> None:
    tune, adapts = TUNES[tuning], tuning in ("lora", "qlora")
    config = ModelConfig(language_model=language_model(kind), vision_tower=tower(tower_kind), projector_type=projector)
    model, processor = build_model(config)
    start = {name: one.clone() for name, one in model.state_dict().items()}
    inputs = {
        "input_ids": processor.encode_question(QUESTION),
        "pixel_values": processor(images=_image(), text="<image>", return_tensors="pt")["pixel_values"],
    }
    if adapts:
        model.save_pretrained(tmp_path / "base")
        processor.save_pretrained(tmp_path / "base")
        built, config = (
            model,
            ModelConfig(checkpoint=str(tmp_path / "base"), quantize="nf4" if tuning == "qlora" else None),
        )
        again, _ = build_model(ModelConfig(checkpoint=str(tmp_path / "base")))
        assert torch.equal(_logits(again, inputs), _logits(built, inputs))

    recipe = _recipe(config, data, tmp_path / "run", tune)
    trainer = _train(recipe, _CopyAtFirstSave(tmp_path / "run", tmp_path / "killed"))
    logits = _logits(trainer.model, inputs)
    if tower_kind == RESUMED[kind]:
        _check_resumed(recipe, tmp_path)
    dataset, _ = stage_records(recipe.stages[0], processor, seed=0)
    _check_encoding(dataset)
    if adapts:
        _check_adapter(config, tmp_path / "run/adapter", logits, inputs)
        _check_merge(build_model(config)[0], tmp_path)
    result = tmp_path / ("merged" if adapts else "run/model")
    reloaded, _ = build_model(ModelConfig(checkpoint=str(result)))
    found = _logits(reloaded, inputs)
    assert torch.allclose(found, logits, atol=1e-4, rtol=1e-4) if adapts else torch.equal(found, logits)
    _check_changes(start, reloaded.state_dict(), tuning)
    _check_packing(trainer.model if adapts else apply_tuning(trainer.model, tune), dataset)
    export(result, tmp_path / "stock", to="hf-llava")
    _check_stock(tmp_path / "stock", Engine(reloaded, processor), inputs)


def _image() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((90, 60))


def _check_resumed(recipe: Recipe, folder: Path) -> None:
    """Check that a run that was killed after its first step ends with the same bits."""
    result = (
        "adapter/adapter_model.safetensors" if isinstance(recipe.stages[0].tune, Lora) else "model/model.safetensors"
    )
    shutil.move(folder / "run", folder / "whole")
    shutil.move(folder / "killed", folder / "run")
    _train(recipe)
    resumed, whole = (load_file(folder / run / result) for run in ("run", "whole"))
    assert resumed.keys() == whole.keys()
    assert [name for name, one in whole.items() if not torch.equal(one, resumed[name])] == []
    lines = [(folder / run / "stage0/metrics.jsonl").read_text().count("\n") for run in ("run", "whole")]
    assert lines == [2, 2]


def _check_encoding(dataset: TrainingDataset) -> None:
    """Check that a record's ids hold its image and, as labels, its answer."""
    processor: Any = dataset.processor
    example = dataset[0].example
    assert int((example.input_ids == processor.image_token_id).sum()) == processor.num_image_tokens
    labels = example.labels[example.labels != IGNORE_INDEX]
    end = processor.conversation_template.end_of_answer()
    record = dataset.records[int(dataset.indices[0])]
    answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    assert processor.tokenizer.decode(labels).strip() == "".join(f"{answer}{end}" for answer in answers)


def _check_changes(start: dict[str, Tensor], ended: dict[str, Tensor], tuning: str) -> None:
    """Check that what is trained has changed, and nothing else."""
    for name, before in start.items():
        if tuning == "qlora" and "layers" in name:
            continue  # merged onto the numbers that the 4 bits stand for
        language = tuning == "full" or (tuning == "lora" and name.endswith("_proj.weight"))
        trained = "projector" in name or (language and "vision_tower" not in name)
        assert torch.equal(before, ended[name]) != trained, name


def _check_adapter(config: ModelConfig, adapter: Path, logits: Tensor, inputs: dict[str, Any]) -> None:
    """Check the logits of the adapter as this package loads it, and as plain peft does."""
    assert torch.equal(_logits(load_adapter(config, adapter), inputs), logits)
    assert torch.equal(_logits(PeftModel.from_pretrained(build_model(config)[0], adapter), inputs), logits)


def _check_merge(base: Any, folder: Path) -> None:
    """Check a merge against peft's, for a base in 4 bits onto the numbers that it stands for."""
    plain = base.dequantize() if is_quantized(base) else base
    theirs = PeftModel.from_pretrained(plain, folder / "run/adapter").merge_and_unload().state_dict()
    report = merge_adapter(base=folder / "base", adapter=folder / "run/adapter", out=folder / "merged")
    assert report.gaps["result"].relative < 1e-4
    ours = load_file(folder / "merged/model.safetensors")
    assert ours.keys() <= theirs.keys()  # a tied head is stored once
    for name, one in ours.items():
        torch.testing.assert_close(one, theirs[name], atol=1e-6, rtol=1e-5, msg=name)


def _check_packing(model: Any, dataset: TrainingDataset) -> None:
    """Check that a packed row has the loss and the gradients of padded rows."""
    pad, found = dataset.processor.tokenizer.pad_token_id, []
    for packed in (False, True):
        assert not packed or enable_packing(model)
        batch = Collator(pad, packed=packed)([dataset[index] for index in range(3)])
        model.train().zero_grad()
        loss, _, _ = supervised_loss(model, {name: one for name, one in batch.items() if name not in ("ids", "faults")})
        loss.backward()
        gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        found.append((float(loss.detach()), gradients))
    disable_packing(model)
    (expected, padded), (loss, gradients) = found
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == padded.keys()
    largest = max(float(one.abs().max()) for one in padded.values())
    for name, one in padded.items():
        torch.testing.assert_close(gradients[name], one, atol=1e-5 * largest, rtol=1e-5, msg=name)


def _check_stock(folder: Path, engine: Engine, inputs: dict[str, Any]) -> None:
    """Check that stock transformers opens an export, prepares the same question, and gives the same answer."""
    ours, processor = engine.base_model, engine.processor
    images = [PromptImage(inputs["pixel_values"][0], processor.num_image_tokens)]
    sampling = Sampling(temperature=0.0, max_new_tokens=6)
    (answer,) = answer_all(engine, [Request(ids=inputs["input_ids"][0], images=images, sampling=sampling)])
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    their_processor = AutoProcessor.from_pretrained(folder)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = their_processor.apply_chat_template(asked, add_generation_prompt=True)
    theirs = their_processor(images=[_image()], text=[text], return_tensors="pt", add_special_tokens=False)
    assert torch.equal(theirs["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(theirs["pixel_values"], inputs["pixel_values"], atol=1e-6, rtol=0)
    logits, softcap = _logits(stock, dict(theirs)), ours.config.text_config.to_dict().get("final_logit_softcapping")
    if softcap:  # stock LLaVA does not cap logits, which leaves their order as it is
        logits = softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(logits, _logits(ours, inputs), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        made = stock.generate(**theirs, do_sample=False, max_new_tokens=6)
    assert tuple(made[0, inputs["input_ids"].shape[1] :].tolist()) == answer.ids
    eos = stock.generation_config.eos_token_id
    assert set(eos if isinstance(eos, list) else [eos]) == set(processor.stop_token_ids)


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
