"""What users do with a model that has cross-attention: batches, adapters, merges, deltas, conversations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Pix2StructImageProcessorPil,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
)

from llavar_peft import CrossAttention, Full, Lora, ModelConfig, Projector, build_model, export, load_chat
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.training_dataset import Collator, TrainingDataset, split_batch
from llavar_peft.errors import ConfigError
from llavar_peft.inference.batch_decoder import answer_all
from llavar_peft.inference.chat import Chat
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.adapter_loading import load_adapter
from llavar_peft.models.merge_adapter import merge_adapter
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.training.supervised_loss import supervised_loss
from llavar_peft.weights.adapter.adapter_report import verify_adapter
from llavar_peft.weights.delta.delta_files import apply_delta, make_delta
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import open_weights
from tests.parts.tiled_parts import (
    PlainModel,
    draw_image,
    logits_of_two_images,
    save_plain_model,
    save_tuned,
)
from tests.parts.tiny_parts import save_tower

RESOLUTION = CrossAttention(grid=2)
LORA = Lora(rank=2, alpha=4.0, dropout=0.0)
QUESTIONS = ("What?", "And this?", "Which of the two is older, and who wrote it?")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> PlainModel:
    return save_plain_model(tmp_path_factory.mktemp("cross"), RESOLUTION)


@pytest.fixture(scope="module")
def adapter(models: PlainModel) -> Path:
    """Return an adapter that was trained with cross-attention on a checkpoint without."""
    return save_tuned(models.added, LORA, models.plain.parent / "adapter")


@pytest.fixture(scope="module")
def full(models: PlainModel) -> Path:
    """Return a model from parts, trained in full, whose cross-attention matters as much as its other parts."""
    folder = save_tuned(models.parts, Full(), models.plain.parent / "full")
    model, _ = build_model(ModelConfig(checkpoint=str(folder), dtype="float32"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if one.ndim == 2 and "vision_tower" not in name:
                one.normal_(std=0.2)
    model.save_pretrained(folder)
    (folder / "weights_checksums.json").unlink(missing_ok=True)
    return folder


def _open(folder: Path, **settings: Any) -> Tensor:
    return logits_of_two_images(*build_model(ModelConfig(checkpoint=str(folder), dtype="float32", **settings)))


def _cross_attention(folder: Path) -> dict[str, Tensor]:
    return {name: one for name, one in open_weights(folder).items() if tensor_names.CROSS_ATTENTION in name}


def test_the_untrained_cross_attention_changes_nothing(models: PlainModel) -> None:
    model, processor = build_model(models.added)
    plain, _ = build_model(ModelConfig(checkpoint=str(models.plain), dtype="float32"))
    text = "USER: <image> or <image>? ASSISTANT:"
    inputs = processor(images=[draw_image(300, 80), draw_image(60, 60)], text=text, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits
        del inputs["detail_values"]
        assert torch.equal(found, plain(**inputs).logits)
    again, _ = build_model(models.added, seed=1)
    one, other = (made.model.cross_attention.layers[0].q_proj.weight for made in (model, again))
    assert not torch.equal(one, other)


def test_an_adapter_contains_the_cross_attention(models: PlainModel, adapter: Path, tmp_path: Path) -> None:
    stored = _cross_attention(adapter / "adapter_model.safetensors")
    assert len(stored) == 2 * 6 + 1
    built, processor = build_model(models.added)
    before = logits_of_two_images(built, processor)
    expected = logits_of_two_images(load_adapter(built, adapter), processor)
    assert (expected - before).abs().max() > 1e-3
    for model, folder in ((adapter, None), (models.plain, adapter)):
        engine = load_chat(model, folder, dtype="float32").engine
        assert torch.equal(logits_of_two_images(engine.model, engine.processor), expected)
    assert verify_adapter(adapter, base=models.plain).base == "fingerprint"

    report = merge_adapter(models.plain, adapter, tmp_path / "merged")
    assert report.gaps["result"].relative < 1e-4
    torch.testing.assert_close(_open(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    for name, one in _cross_attention(tmp_path / "merged").items():
        assert torch.equal(one, stored[f"base_model.model.{name}"])
    for layout in ("hf-llava", "original"):
        with pytest.raises(ConfigError, match=r"no engine that reads .* train a model with resolution: {type: tiles}"):
            export(tmp_path / "merged", tmp_path / layout, to=layout)  # type: ignore[arg-type]
    export(tmp_path / "merged", tmp_path / "ours", to="llavar")
    assert torch.equal(_open(tmp_path / "ours"), _open(tmp_path / "merged"))


def test_training_an_adapter_keeps_one_cross_attention(models: PlainModel) -> None:
    """In half precision, the base's would otherwise stand beside the float32 one that is trained."""
    model, _ = build_model(dataclasses.replace(models.added, dtype="bfloat16"))
    names = [name for name, _ in model.named_parameters() if "cross_attention" in name]
    trained = apply_tuning(model, LORA, new_rows=True)
    found = {name: one for name, one in trained.named_parameters() if "cross_attention" in name}
    assert len(found) == len(names)
    assert {(one.dtype, one.requires_grad) for one in found.values()} == {(torch.float32, True)}
    with trained.disable_adapter(), pytest.raises(AttributeError, match="load it with load_adapter"):
        _ = trained.get_base_model().model.cross_attention.layers


def test_an_adapter_is_merged_into_the_language_model_of_its_parts(models: PlainModel, tmp_path: Path) -> None:
    adapter = save_tuned(models.parts, LORA, tmp_path / "adapter")
    assert verify_adapter(adapter, base=models.vicuna).base == "fingerprint"
    merge_adapter(models.vicuna, adapter, tmp_path / "merged", probe=False)
    expected = logits_of_two_images(load_adapter(models.parts, adapter), build_model(models.parts)[1])
    torch.testing.assert_close(_open(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)


def test_a_delta_contains_the_cross_attention_itself(
    models: PlainModel, full: Path, adapter: Path, tmp_path: Path
) -> None:
    make_delta(models.vicuna, full, tmp_path / "delta")
    apply_delta(models.vicuna, tmp_path / "delta", tmp_path / "applied")
    stored = _cross_attention(full)
    assert len(stored) == 2 * 6 + 1
    for folder in ("delta", "applied"):
        found = _cross_attention(tmp_path / folder)
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], one.half()) for name, one in stored.items())
    found = _open(tmp_path / "applied", vision_tower=str(models.tower))
    torch.testing.assert_close(found, _open(full), atol=0.05, rtol=0.05)

    make_delta(models.vicuna, models.plain, tmp_path / "of adapter", adapter=adapter)
    apply_delta(models.vicuna, tmp_path / "of adapter", tmp_path / "with adapter")
    expected = logits_of_two_images(load_adapter(models.plain, adapter), build_model(models.added)[1])
    found = _open(tmp_path / "with adapter", vision_tower=str(models.tower))
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


def test_a_projector_file_contains_the_cross_attention(models: PlainModel, tmp_path: Path) -> None:
    trained = save_tuned(models.parts, Projector(), tmp_path / "stage1")
    for file in ("mm_projector.bin", "mm_projector.safetensors"):
        again, processor = build_model(dataclasses.replace(models.parts, projector=str(trained / file)))
        assert torch.equal(logits_of_two_images(again, processor), _open(trained))
    plain = dataclasses.replace(models.parts, resolution=None)
    with pytest.raises(Exception, match=r"cross_attention"):
        build_model(dataclasses.replace(plain, projector=str(trained / "mm_projector.bin")))
    # A projector that was trained without is a start for a model with it.
    without = save_tuned(plain, Projector(), tmp_path / "plain")
    start, _ = build_model(dataclasses.replace(models.parts, projector=str(without / "mm_projector.bin")))
    assert not start.model.cross_attention.layers[0].v_proj.weight.any()


def _dataset(processor: Any, root: Path) -> TrainingDataset:
    draw_image(300, 80).save(root / "wide.png")
    draw_image(60, 200).save(root / "tall.png")
    answer = {"from": "gpt", "value": "A sign."}
    records = [
        {"id": "1", "image": "wide.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, answer]},
        {"id": "2", "conversations": [{"from": "human", "value": "What is it? Say it."}, answer]},
        {
            "id": "3",
            "image": ["tall.png", "wide.png"],
            "conversations": [
                {"from": "human", "value": "First <image>"}, answer, {"from": "human", "value": "and <image>"}, answer,
            ],
        },
    ]  # fmt: skip
    return TrainingDataset(records, [0, 1, 2], ImageRoots([root]), processor, max_length=1024)  # type: ignore[arg-type]


@pytest.mark.parametrize("tune", [Projector(), LORA], ids=["projector", "lora"])
def test_batches_of_all_kinds_give_the_same_gradients(
    tune: Any, models: PlainModel, full: Path, tmp_path: Path
) -> None:
    """Padded rows, where the model has to find the images, and where it is told; a packed row, whole and in passes."""
    model, processor = build_model(ModelConfig(checkpoint=str(full), dtype="float32"))
    data = _dataset(processor, tmp_path)
    items = [data[index] for index in range(3)]
    trained = apply_tuning(model, tune).train()

    def gradients(batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        trained.zero_grad()
        for batch in batches:
            supervised_loss(trained, batch)[0].backward()
        found = {name: one.grad.clone() for name, one in trained.named_parameters() if one.requires_grad}
        assert sum(bool(one.any()) for name, one in found.items() if "cross_attention" in name) == 2 * 6 + 1
        return found

    expected = gradients([Collator(0)(items)])
    padded = Collator(0, image_token_id=processor.image_token_id)(items)
    assert padded["image_starts"][1] == ()
    batches = [[padded]]
    assert enable_packing(model)
    row = Collator(0, packed=True, image_token_id=processor.image_token_id)(items)
    packed = {name: value for name, value in row.items() if name not in ("ids", "faults")}
    batches += [[packed], split_batch(packed, [[2, 1], [0], []])]
    for each in batches:
        for name, one in gradients(each).items():
            torch.testing.assert_close(one, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def _greedy(model: Any, processor: Any, request: Any, count: int) -> list[int]:
    """Answer without a cache: one complete pass for each token."""
    from llavar_peft.inference.generation_request import inputs_of_images

    ids, images = request.ids[None], inputs_of_images(request.images, torch.device("cpu"))
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, **images).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        if int(ids[0, -1]) in processor.stop_token_ids:
            break
    found: list[int] = ids[0, len(request.ids) :].tolist()
    return found


def test_decoding_equals_complete_passes(full: Path) -> None:
    engine = Engine(*build_model(ModelConfig(checkpoint=str(full), dtype="float32")))
    chat, wide, tall = Chat(engine), draw_image(300, 80), draw_image(60, 200)
    shown = (wide, None, [tall, wide])
    greedy = Sampling(temperature=0.0, max_new_tokens=6)
    requests = [chat.request(images, text, sampling=greedy) for images, text in zip(shown, QUESTIONS, strict=True)]
    expected = [_greedy(engine.base_model, engine.processor, request, 6) for request in requests]
    for size in (1, 3):
        answers = answer_all(engine, requests, batch_size=size)
        assert [list(answer.ids) for answer in answers] == expected


def test_a_conversation_keeps_the_features_of_its_images(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build_model(ModelConfig(checkpoint=str(full), dtype="float32"))
    crops: list[int] = []
    plain = model.model.get_detail_features

    def watched(detail_values: Tensor) -> list[Tensor]:
        crops.append(len(detail_values))
        return plain(detail_values)

    monkeypatch.setattr(model.model, "get_detail_features", watched)
    chat = Chat(Engine(model, processor))
    wide, tall = draw_image(300, 80), draw_image(60, 200)
    talk = chat.conversation(wide)
    options: Any = {"max_new_tokens": 4, "temperature": 0.0}
    answers = [talk.send("What?", **options), talk.send("And this?", tall, **options), talk.send("Both?", **options)]
    assert crops == [1, 1]
    alone = []
    for turns in (1, 2, 3):
        fresh = chat.conversation(wide)
        for number in range(turns):
            found = fresh.send(("What?", "And this?", "Both?")[number], tall if number == 1 else None, **options)
        alone.append(found)
    assert answers == alone


def test_transformers_generates_with_auto_classes(full: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(full, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(full)
    engine = Engine(*build_model(ModelConfig(checkpoint=str(full), dtype="float32")))
    inputs = processor(
        images=[draw_image(300, 80), draw_image(60, 60)], text=["<image> What?", "<image> What is this?"],
        padding=True, padding_side="left", return_tensors="pt",
    )  # fmt: skip
    together = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, (size, text) in enumerate((((300, 80), "<image> What?"), ((60, 60), "<image> What is this?"))):
        request = Chat(engine).request(draw_image(*size), "x", sampling=Sampling(temperature=0.0, max_new_tokens=5))
        ids = processor(images=draw_image(*size), text=text, return_tensors="pt")["input_ids"][0]
        (alone,) = answer_all(engine, [dataclasses.replace(request, ids=ids)])
        assert list(alone.ids) == together[row, : len(alone.ids)].tolist()


def test_the_cross_attention_is_not_quantized(full: Path) -> None:
    model, processor = build_model(ModelConfig(checkpoint=str(full), dtype="float32", quantize="nf4"), device="cpu")
    kinds = {type(module).__name__ for module in model.model.cross_attention.modules()}
    assert "Linear4bit" not in kinds
    assert type(model.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    stored = _cross_attention(full)
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in stored.items())
    assert torch.isfinite(logits_of_two_images(model, processor)).all()


def _save_pix2struct(folder: Path) -> Path:
    config = Pix2StructVisionConfig(
        hidden_size=24,
        patch_embed_hidden_size=768,
        d_ff=48,
        d_kv=6,
        num_hidden_layers=2,
        num_attention_heads=4,
        seq_len=64,
    )
    torch.manual_seed(2)
    Pix2StructVisionModel(config).save_pretrained(folder)
    Pix2StructImageProcessorPil(max_patches=12).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pix2struct", "siglip_vision_model"])
def test_another_encoder(kind: str, models: PlainModel, tmp_path: Path) -> None:
    folder = _save_pix2struct(tmp_path / kind) if kind == "pix2struct" else save_tower(kind, tmp_path / kind)
    config = dataclasses.replace(models.added, resolution=CrossAttention(encoder=str(folder)))
    model, processor = build_model(config)
    plain, _ = build_model(ModelConfig(checkpoint=str(models.plain), dtype="float32"))
    inputs = processor(
        images=[draw_image(300, 80), draw_image(30, 60)], text="<image> or <image>?", return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**inputs).logits
        del inputs["detail_values"]
        assert torch.equal(found, plain(**inputs).logits)
    stored = dict(open_weights(folder))
    frozen = model.model.detail_encoder.state_dict()
    assert frozen.keys() == stored.keys()
    assert all(torch.equal(one, frozen[name]) for name, one in stored.items())

    trained = apply_tuning(model, Projector()).train()
    data = _dataset(processor, tmp_path)
    batch = Collator(0, image_token_id=processor.image_token_id)([data[index] for index in range(3)])
    supervised_loss(trained, batch)[0].backward()
    values = model.model.cross_attention.layers[0].v_proj.weight
    assert values.grad.abs().max() > 0  # type: ignore[union-attr]
    assert all(one.grad is None for one in model.model.detail_encoder.parameters())

    adapter = save_tuned(config, LORA, tmp_path / "adapter")
    assert not [name for name in open_weights(adapter / "adapter_model.safetensors") if "detail_encoder" in name]
    expected = logits_of_two_images(load_adapter(config, adapter), processor)
    assert (expected - logits_of_two_images(*build_model(config))).abs().max() > 1e-4
    merge_adapter(models.plain, adapter, tmp_path / "merged", probe=False)
    torch.testing.assert_close(_open(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    # A saved model contains the encoder.
    whole, processor = build_model(ModelConfig(checkpoint=str(tmp_path / "merged"), dtype="float32"))
    whole.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    folder.rename(tmp_path / "elsewhere")
    assert torch.equal(_open(tmp_path / "whole"), logits_of_two_images(whole, processor))
    with pytest.raises(ConfigError, match=r"model\.resolution\.encoder: no such folder"):
        build_model(config)


def test_what_does_not_fit_is_rejected(models: PlainModel, adapter: Path, full: Path) -> None:
    plain, _ = build_model(ModelConfig(checkpoint=str(models.plain), dtype="float32"))
    with pytest.raises(ConfigError, match="was trained on a model that has a cross-attention, and this one reads the"):
        load_adapter(plain, adapter)
    with pytest.raises(ConfigError, match=r"resolution\.grid: .*got 3, expected 2"):
        build_model(ModelConfig(checkpoint=str(full), resolution=CrossAttention(grid=3)))
    described = json.loads((full / "config.json").read_text())
    assert described["resolution"] == {"type": "cross_attention", "encoder": "concat_clip", "grid": 2}
