"""What users do with a model that reads tiles: adapters, merges, deltas, projector files, training, conversations."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from llavar_peft import Full, Lora, ModelConfig, Projector, build_model, cli, export, load_chat
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.encode_record import encode_record
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.training_dataset import Collator, TrainingDataset, split_batch
from llavar_peft.inference.chat import Chat
from llavar_peft.inference.engine import Engine
from llavar_peft.models.adapter_loading import load_adapter
from llavar_peft.models.merge_adapter import merge_adapter
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.resolution import Tiles
from llavar_peft.serving.api.request_images import RequestImageReader
from llavar_peft.serving.api.request_limits import RequestLimits
from llavar_peft.training.supervised_loss import supervised_loss
from llavar_peft.weights.adapter.adapter_report import verify_adapter
from llavar_peft.weights.delta.delta_files import apply_delta, make_delta
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.projector_file import read_projector
from llavar_peft.weights.io.tensor_blocks import open_weights
from tests.parts.tiled_parts import (
    PlainModel,
    draw_image,
    logits_of_two_images,
    open_stock,
    save_llava_next,
    save_plain_model,
    save_tuned,
    stock_inputs,
)
from tests.serving.server import data_url, serving

TILES = Tiles(grid=((1, 2), (2, 1)))
LORA = Lora(rank=2, alpha=4.0, dropout=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> PlainModel:
    return save_plain_model(tmp_path_factory.mktemp("tiles"), TILES)


@pytest.fixture(scope="module")
def adapter(models: PlainModel) -> Path:
    """Return an adapter that was trained with tiles on a checkpoint without."""
    return save_tuned(models.added, LORA, models.plain.parent / "adapter")


@pytest.fixture(scope="module")
def full(models: PlainModel) -> Path:
    """Return a model from parts with tiles, trained in full."""
    return save_tuned(models.parts, Full(), models.plain.parent / "full")


def _newline(folder: Path, name: str = tensor_names.NEWLINE) -> Tensor:
    return dict(open_weights(folder))[name]


def _open(folder: Path, **settings: Any) -> Tensor:
    return logits_of_two_images(*build_model(ModelConfig(checkpoint=str(folder), dtype="float32", **settings)))


def test_an_adapter_brings_its_tiles_to_a_base_without(models: PlainModel, adapter: Path, tmp_path: Path) -> None:
    name = f"base_model.model.{tensor_names.NEWLINE}"
    trained = _newline(adapter / "adapter_model.safetensors", name)
    built, processor = build_model(models.added)
    assert not torch.equal(trained, built.model.multi_modal_projector.image_newline)
    expected = logits_of_two_images(load_adapter(built, adapter), processor)
    for model, folder in ((adapter, None), (models.plain, adapter)):
        engine = load_chat(model, folder, dtype="float32").engine
        assert engine.processor.tile_geometry.grids == TILES.grids
        assert torch.equal(logits_of_two_images(engine.model, engine.processor), expected)
    assert torch.equal(logits_of_two_images(load_adapter(models.plain, adapter), processor), expected)
    assert verify_adapter(adapter, base=models.plain).base == "fingerprint"

    report = merge_adapter(models.plain, adapter, tmp_path / "merged")
    assert report.gaps["result"].relative < 1e-4
    assert torch.equal(_newline(tmp_path / "merged"), trained)
    for file in ("config.json", "processor_config.json"):
        assert json.loads((tmp_path / "merged" / file).read_text())["resolution"]["grid"] == [[1, 2], [2, 1]]
    torch.testing.assert_close(_open(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    export(tmp_path / "merged", tmp_path / "stock", to="hf-llava")
    model, theirs = open_stock(tmp_path / "stock")
    images = [draw_image(300, 80), draw_image(60, 60)]
    block = "<im_start><im_patch><im_end>"
    inputs = stock_inputs(theirs, images, [f"<s>USER: {block} or {block}? ASSISTANT:"])
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_an_adapter_of_a_stock_checkpoint_is_merged_in_its_layout(tmp_path: Path) -> None:
    stock = save_llava_next(tmp_path / "stock")
    config = ModelConfig(checkpoint=str(stock), dtype="float32")
    adapter = save_tuned(config, LORA, tmp_path / "adapter")
    expected = logits_of_two_images(load_adapter(config, adapter), build_model(config)[1])
    merge_adapter(stock, adapter, tmp_path / "merged")
    torch.testing.assert_close(_open(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    model, processor = open_stock(tmp_path / "merged")
    images = [draw_image(300, 80), draw_image(60, 60)]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert "<image>" in processor.apply_chat_template(messages)
    inputs = stock_inputs(processor, images, ["<s>USER: <image> or <image>? ASSISTANT:"])
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)

    other = dataclasses.replace(config, resolution=Tiles(grid=(3, 3)))  # type: ignore[arg-type]
    larger = save_tuned(other, LORA, tmp_path / "larger")
    with pytest.raises(Exception, match=r"has not the resolution that .*larger was trained with.*--to llavar"):
        merge_adapter(stock, larger, tmp_path / "no")
    export(stock, tmp_path / "ours", to="llavar")
    merge_adapter(tmp_path / "ours", larger, tmp_path / "yes")
    assert build_model(ModelConfig(checkpoint=str(tmp_path / "yes")))[1].tile_geometry.grids == ((3, 3),)


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_language_model_of_its_parts(models: PlainModel, tmp_path: Path) -> None:
    adapter = save_tuned(models.parts, LORA, tmp_path / "adapter")
    assert verify_adapter(adapter, base=models.vicuna).base == "fingerprint"
    merge_adapter(models.vicuna, adapter, tmp_path / "merged")
    expected = logits_of_two_images(load_adapter(models.parts, adapter), build_model(models.parts)[1])
    torch.testing.assert_close(_open(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", [1, 2])
def test_a_delta_keeps_newline_and_resolution(pool: Any, models: PlainModel, full: Path, tmp_path: Path) -> None:
    target = full
    if pool == 2:
        pooled = dataclasses.replace(models.parts, resolution=dataclasses.replace(TILES, pool=2))
        target = save_tuned(pooled, Full(), tmp_path / "pooled")
    make_delta(models.vicuna, target, tmp_path / "delta")
    apply_delta(models.vicuna, tmp_path / "delta", tmp_path / "applied")
    for folder in ("delta", "applied"):
        found = _newline(tmp_path / folder, tensor_names.RELEASED_NEWLINE)
        assert torch.equal(found, _newline(target).half())
        described = json.loads((tmp_path / folder / "config.json").read_text())
        assert ("image_grid_pinpoints" in described) == (pool == 1)
    if pool == 1:  # (width, height), as LLaVA's code has them
        assert described["image_grid_pinpoints"] == [[112, 56], [56, 112]]
        assert (described["mm_patch_merge_type"], described["image_aspect_ratio"]) == ("spatial_unpad", "anyres")
    found = _open(tmp_path / "applied", vision_tower=str(models.tower))
    torch.testing.assert_close(found, _open(target), atol=5e-3, rtol=5e-3)


@pytest.mark.slow
def test_a_delta_is_made_with_the_tiles_of_an_adapter(models: PlainModel, adapter: Path, tmp_path: Path) -> None:
    make_delta(models.vicuna, models.plain, tmp_path / "delta", adapter=adapter)
    apply_delta(models.vicuna, tmp_path / "delta", tmp_path / "applied")
    expected = logits_of_two_images(load_adapter(models.plain, adapter), build_model(models.added)[1])
    found = _open(tmp_path / "applied", vision_tower=str(models.tower))
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


def test_the_original_layout_keeps_tiles(models: PlainModel, full: Path, tmp_path: Path) -> None:
    export(full, tmp_path / "original", to="original", dtype="float32", tokenizer=models.vicuna)
    export(tmp_path / "original", tmp_path / "ours", to="llavar", vision_tower=models.tower)
    assert torch.equal(_open(tmp_path / "ours"), _open(full))
    # As LLaVA 1.6 writes it, without our own setting.
    path = tmp_path / "original" / "config.json"
    described = json.loads(path.read_text())
    assert described.pop("mm_resolution")
    path.write_text(json.dumps(described))
    assert torch.equal(_open(tmp_path / "original", vision_tower=str(models.tower)), _open(full))


@pytest.mark.slow
def test_the_trained_tower_of_llava_1_6_is_read_from_its_weights(
    models: PlainModel, full: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    export(full, tmp_path / "original", to="original", dtype="float32", form="safetensors", tokenizer=models.vicuna)
    folder = tmp_path / "original"
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unfreeze_mm_vision_tower": True}))
    with pytest.raises(Exception, match="unfreeze_mm_vision_tower: its vision tower was trained, and is not among"):
        _open(folder, vision_tower=str(models.tower))
    ours = dict(open_weights(full))
    tower = {
        name.replace(tensor_names.TOWER, "model.vision_tower.vision_tower.vision_model."): one * 1.5
        for name, one in ours.items()
        if name.startswith(tensor_names.TOWER)
    }
    (file,) = folder.glob("*.safetensors")
    save_file({**load_file(file), **tower}, file, metadata={"format": "pt"})
    (folder / "weights_checksums.json").unlink(missing_ok=True)
    model, processor = build_model(ModelConfig(checkpoint=str(folder), vision_tower=str(models.tower), dtype="float32"))
    expected, _ = build_model(ModelConfig(checkpoint=str(full), dtype="float32"))
    with torch.no_grad():
        for parameter in expected.model.vision_tower.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logits_of_two_images(model, processor), logits_of_two_images(expected, processor))
    export(folder, tmp_path / "ours", to="llavar", vision_tower=models.tower)
    assert torch.equal(_open(tmp_path / "ours"), logits_of_two_images(expected, processor))

    config = ModelConfig(checkpoint=str(folder), vision_tower=str(models.tower), dtype="float32")
    adapter = save_tuned(config, LORA, tmp_path / "adapter")
    answers = logits_of_two_images(load_adapter(config, adapter), processor)
    merge_adapter(folder, adapter, tmp_path / "merged")
    torch.testing.assert_close(
        _open(tmp_path / "merged", vision_tower=str(models.tower)), answers, atol=1e-4, rtol=1e-4
    )
    tuned = save_tuned(config, dataclasses.replace(LORA, tower_rank=2), tmp_path / "tuned")
    answers = logits_of_two_images(load_adapter(config, tuned), processor)
    merge_adapter(folder, tuned, tmp_path / "both")
    torch.testing.assert_close(_open(tmp_path / "both", vision_tower=str(models.tower)), answers, atol=1e-4, rtol=1e-4)
    with pytest.raises(Exception, match="its vision tower was trained, and the released layout has none"):
        make_delta(models.vicuna, folder, tmp_path / "delta")


def test_a_projector_file_contains_the_newline(models: PlainModel, tmp_path: Path) -> None:
    trained = save_tuned(models.parts, Projector(), tmp_path / "stage1")
    newline = read_projector(trained / "mm_projector.bin")[tensor_names.NEWLINE]
    assert torch.equal(newline, _newline(trained))
    again, _ = build_model(dataclasses.replace(models.parts, projector=str(trained / "mm_projector.bin")))
    assert torch.equal(again.model.multi_modal_projector.image_newline, newline)
    plain = dataclasses.replace(models.parts, resolution=None)
    with pytest.raises(Exception, match=r"has model\.image_newline: it was trained with tiles"):
        build_model(dataclasses.replace(plain, projector=str(trained / "mm_projector.bin")))
    without = save_tuned(plain, Projector(), tmp_path / "plain")
    with pytest.raises(Exception, match=r"no model\.image_newline in this file: it was trained without tiles"):
        build_model(dataclasses.replace(models.parts, projector=str(without / "mm_projector.bin")))
    # The fix of the message.
    fixed, _ = build_model(ModelConfig(checkpoint=str(without), resolution=TILES))
    assert fixed.config.tiles is not None


def _dataset(processor: Any, root: Path, *, max_length: int = 1024) -> TrainingDataset:
    draw_image(300, 80).save(root / "wide.png")
    draw_image(60, 200).save(root / "tall.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A sign."}]
    two = [{"from": "human", "value": "<image> and <image>\nWhat?"}, {"from": "gpt", "value": "A sign."}]
    records = [
        {"id": "1", "image": "wide.png", "conversations": turns},
        {"id": "2", "conversations": [{**turns[0], "value": "What?"}, turns[1]]},
        {"id": "3", "image": ["tall.png", "wide.png"], "conversations": two},
    ]
    return TrainingDataset(records, [0, 1, 2], ImageRoots([root]), processor, max_length=max_length)  # type: ignore[arg-type]


@pytest.mark.parametrize("tune", [Projector(), Full(), LORA, Full(train_tower=True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_stage_trains_the_newline_also_on_text_alone(
    tune: Any, checkpointing: bool, models: PlainModel, tmp_path: Path
) -> None:
    model, processor = build_model(models.added)
    trained = apply_tuning(model, tune, new_rows=True).train()
    if checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    data = _dataset(processor, tmp_path)
    items, collate = [data[index] for index in range(3)], Collator(0, image_token_id=processor.image_token_id)
    newline = next(
        one for name, one in trained.named_parameters() if name.endswith("image_newline") and one.requires_grad
    )
    gradients = []
    for chosen in (items, items[1:2]):
        trained.zero_grad()
        batch = collate(chosen)
        loss, _, _ = supervised_loss(trained, batch)
        loss.backward()
        gradients.append(newline.grad.clone())  # type: ignore[union-attr]
        if isinstance(tune, Full) and tune.train_tower:
            patch = model.model.vision_tower.embeddings.patch_embedding.weight
            assert patch.grad is not None
    assert gradients[0].abs().max() > 0
    assert not gradients[1].any()


def test_a_packed_row_is_split_with_its_images(models: PlainModel, tmp_path: Path) -> None:
    """The gradients of packed and padded batches, and of a packed row in several passes, are the same."""
    from llavar_peft.models.packed_attention import enable_packing

    model, processor = build_model(models.added)
    data = _dataset(processor, tmp_path)
    items = [data[index] for index in range(3)]
    trained = apply_tuning(model, Projector()).train()

    def gradient(batches: list[dict[str, Any]]) -> tuple[float, Tensor]:
        trained.zero_grad()
        losses = [supervised_loss(trained, batch)[0] for batch in batches]
        sum(losses).backward()  # type: ignore[union-attr]
        return float(sum(losses).detach()), model.model.multi_modal_projector.image_newline.grad.clone()  # type: ignore[union-attr]

    padded = gradient([Collator(0, image_token_id=processor.image_token_id)(items)])
    assert enable_packing(model)
    row = Collator(0, packed=True, image_token_id=processor.image_token_id)(items)
    plain = {name: value for name, value in row.items() if name not in ("ids", "faults")}
    for batches in ([plain], split_batch(plain, [[2, 1], [0], []])):
        loss, newline = gradient(batches)
        assert loss == pytest.approx(padded[0], rel=1e-5)
        torch.testing.assert_close(newline, padded[1], atol=1e-6, rtol=1e-4)


def test_a_record_gets_the_largest_grid_that_fits(models: PlainModel, tmp_path: Path) -> None:
    resolution = Tiles(grid=((1, 1), (1, 2), (2, 2), (4, 4)))
    _, processor = build_model(dataclasses.replace(models.added, resolution=resolution))
    draw_image(400, 400).save(tmp_path / "page.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A sign."}]
    record = {"id": "1", "image": "page.png", "conversations": turns}
    roots, grids = ImageRoots([tmp_path]), []
    free = encode_record(record, processor, 4096, roots=roots)
    text = len(free.input_ids) - sum(free.image_token_counts)
    for most in (4096, len(free.input_ids), len(free.input_ids) - 1, text + 88, text + 36, text + 35):
        example = encode_record(record, processor, most, roots=roots)
        assert len(example.input_ids) <= most
        assert int((example.input_ids == processor.image_token_id).sum()) == sum(example.image_token_counts)
        grids.append(example.image_layouts[0][:2])
        # If not even the smallest grid fits, the end of the text is cut.
        missing = int((free.labels != IGNORE_INDEX).sum() - (example.labels != IGNORE_INDEX).sum())
        assert missing == max(0, text + 36 - most)
    assert grids == [(4, 4), (4, 4), (2, 2), (2, 2), (1, 1), (1, 1)]


def test_inference_shares_the_limit_of_image_tokens(models: PlainModel) -> None:
    limited = dataclasses.replace(
        models.added, resolution=Tiles(grid=((1, 1), (2, 2), (4, 4)), max_image_tokens=2 * 88)
    )
    model, processor = build_model(limited)
    chat = Chat(Engine(model, processor))
    page = draw_image(400, 400)
    alone, both = (chat.request(images, "What?").images for images in (page, [page, page]))
    assert [image.layout[:2] for image in alone] == [(2, 2)]  # type: ignore[index]
    assert [image.layout[:2] for image in both] == [(2, 2), (2, 2)]  # type: ignore[index]
    three = chat.request([page] * 3, "What?").images
    assert sum(image.tokens for image in three) <= 2 * 88
    inputs = processor(images=[page] * 3, text=["<image>", "<image><image>"], padding=True, return_tensors="pt")
    assert [tuple(row[:2]) for row in inputs["image_layouts"].tolist()] == [(2, 2), (2, 2), (2, 2)]
    talk = chat.conversation(page)
    talk.send("What?", max_new_tokens=1, temperature=0.0)
    talk.send("And this?", page, max_new_tokens=1, temperature=0.0)
    talk.send("And that?", page, max_new_tokens=1, temperature=0.0)
    assert [turn.images[0].layout[:2] for turn in talk.turns] == [(2, 2), (2, 2), (1, 1)]  # type: ignore[index]


def test_a_conversation_keeps_the_features_of_its_images(models: PlainModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build_model(models.added)
    views: list[int] = []
    plain = model.model.get_image_features

    def watched(pixel_values: Any, **options: Any) -> Any:
        views.append(len(pixel_values))
        return plain(pixel_values, **options)

    monkeypatch.setattr(model.model, "get_image_features", watched)
    chat = Chat(Engine(model, processor))
    wide, tall = draw_image(300, 80), draw_image(60, 200)
    talk = chat.conversation(wide)
    options: Any = {"max_new_tokens": 4, "temperature": 0.0}
    answers = [talk.send("What?", **options), talk.send("And this?", tall, **options), talk.send("Both?", **options)]
    assert views == [3, 3]
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
    inputs = processor(
        images=[draw_image(300, 80), draw_image(60, 60)], text=["<image> What?", "<image> What is this?"],
        padding=True, padding_side="left", return_tensors="pt",
    )  # fmt: skip
    together = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, (size, text) in enumerate((((300, 80), "<image> What?"), ((60, 60), "<image> What is this?"))):
        one = processor(images=draw_image(*size), text=text, return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=5, do_sample=False)[0, one["input_ids"].shape[1] :]
        assert alone.tolist() == together[row, : len(alone)].tolist()
        for several in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            with pytest.raises(ValueError, match="=2, expected 1 with tiles"):
                model.generate(**one, max_new_tokens=2, **several)


def test_requests_of_the_server_share_the_limit_and_answer_as_a_chat(models: PlainModel) -> None:
    limited = dataclasses.replace(
        models.added, resolution=Tiles(grid=((1, 1), (2, 2), (4, 4)), max_image_tokens=2 * 88)
    )
    chat = Chat(Engine(*build_model(limited)))
    reader = RequestImageReader(chat.engine.processor, RequestLimits())
    data = io.BytesIO()
    draw_image(400, 400).save(data, "PNG")
    url = data_url(data.getvalue())
    assert [reader.open([url] * count)[0][0].layout[:2] for count in (1, 2, 3)] == [(2, 2), (2, 2), (1, 1)]  # type: ignore[index]
    assert reader.open([url] * 2)[0][0] is reader.open([url] * 2)[1][0]
    with serving(chat) as (address, _):
        body = {
            "model": "tiny", "max_tokens": 4, "temperature": 0,
            "messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "What?"},
            ]}],
        }  # fmt: skip
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    image = draw_image(400, 400)
    expected = chat.ask([image, image], "What?", max_new_tokens=4, temperature=0.0)
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.slow
def test_the_commands_measure_the_images(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_image(300, 80).save(tmp_path / "wide.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A sign."}]
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"id": "1", "image": "wide.png", "conversations": turns}]))
    inspect = ["data", "inspect", str(records), "--model", str(full)]
    assert cli.main([*inspect, "--images", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    inputs = AutoProcessor.from_pretrained(full)(images=draw_image(300, 80), text="<image>", return_tensors="pt")
    views, (layout,) = inputs["pixel_values"], inputs["image_layouts"].tolist()
    assert (len(views), layout[:2]) == (3, [1, 2])
    token = AutoProcessor.from_pretrained(full).image_token_id
    assert found["input_ids"].count(token) == 16 + layout[2] * (layout[3] + 1)
    assert cli.main(inspect) == 2
    assert "--images" in capsys.readouterr().err
    ask = ["ask", "--model", str(full), "--image", str(tmp_path / "wide.png"), "What?", "--temperature", "0"]
    assert cli.main(ask) == 0
