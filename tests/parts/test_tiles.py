"""Tiles against LLaVA-NeXT of stock transformers: pixels, tokens, logits and answers, and its layout in and out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaNextProcessor

from llavar_peft import ModelConfig, build_model, export
from llavar_peft.constants import VICUNA_SYSTEM_PROMPT
from llavar_peft.inference.chat import Chat
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.packed_attention import enable_packing, packed_arguments
from llavar_peft.recipe.resolution import Tiles
from llavar_peft.weights.io.tensor_blocks import open_weights
from tests.parts.tiled_parts import (
    PINPOINTS,
    SIDE,
    draw_image,
    open_stock,
    save_llama,
    save_llava_next,
    stock_inputs,
)

_DRAWN = np.random.default_rng(5).integers(1, 400, (34, 2)).tolist()
SHAPES = [
    (1, 1), (4000, 300), (300, 4000), (1, 300), (300, 1), (3, 50), (50, 3), (SIDE, SIDE), (100, 50), (37, 91),
    (4 * SIDE, 2 * SIDE), (2 * SIDE + 1, 2 * SIDE - 1), *map(tuple, _DRAWN),
]  # fmt: skip


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return dict(open_weights(folder))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava_next(tmp_path_factory.mktemp("llava-1.6"))


# The templates of ``llava-hf/llava-v1.6-mistral-7b-hf`` and, with this tokenizer's special tokens, of ``-34b-hf``. They
# read lists of parts only.
_RENDER_PARTS = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
)
TEMPLATES = {
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' }}" + _RENDER_PARTS + "{{' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "34b": (
        "{% for message in messages %}{{'<pad>' + message['role'] + '\n'}}" + _RENDER_PARTS
        + "{{'</s>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<pad>assistant\n' }}{% endif %}"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(stock: Path) -> tuple[Any, Any]:
    return open_stock(stock)


@pytest.fixture(scope="module")
def ours(stock: Path) -> tuple[Any, Any]:
    return build_model(ModelConfig(checkpoint=str(stock), dtype="float32"))


def test_a_stock_checkpoint_is_read_with_its_grids(stock: Path, ours: tuple[Any, Any]) -> None:
    names = read_tensors(stock).keys()
    assert {"image_newline", "multi_modal_projector.linear_1.weight", "language_model.model.norm.weight"} <= names
    model, processor = ours
    assert model.config.tiles == Tiles(grid=tuple((height // SIDE, width // SIDE) for height, width in PINPOINTS))
    assert processor.tile_geometry.side == SIDE
    assert (processor.template, processor.image_token) == ("vicuna_v1", "<image>")


@pytest.mark.parametrize("number", range(4))
def test_images_of_any_shape_give_the_pixels_tokens_and_logits_of_stock(
    number: int, theirs: tuple[Any, Any], ours: tuple[Any, Any]
) -> None:
    assert len(SHAPES) >= 40
    for size in SHAPES[number::4]:
        image, text = draw_image(*size), "USER: <image>\nWhat is written? ASSISTANT:"
        expected = stock_inputs(theirs[1], [image], [text])
        got = ours[1](images=[image], text=text, add_special_tokens=False, return_tensors="pt")
        views = len(got["pixel_values"])
        assert torch.equal(got["pixel_values"], expected["pixel_values"][0][:views]), size
        assert not expected["pixel_values"][0][views:].any()
        assert torch.equal(got["input_ids"], expected["input_ids"]), size
        with torch.no_grad():
            logits = theirs[0](**expected).logits
            torch.testing.assert_close(ours[0](**got).logits, logits, atol=1e-5, rtol=1e-5, msg=str(size))


def _prompt(images: int) -> str:
    return f"USER: {'<image>' * images}\nWhat is written? ASSISTANT:"


def test_several_images_in_a_prompt_and_padded_prompts_give_the_logits_of_stock(
    theirs: tuple[Any, Any], ours: tuple[Any, Any]
) -> None:
    images = [draw_image(*size) for size in ((300, 80), (60, 200), (56, 56), (90, 91))]
    text = [_prompt(3), f"{_prompt(1)} A longer question?"]
    expected = stock_inputs(theirs[1], images, text)
    got = ours[1](images=images, text=text, add_special_tokens=False, padding=True, return_tensors="pt")
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert got["image_layouts"].shape == (4, 4)
    mask = expected["attention_mask"].bool()
    with torch.no_grad():
        logits = theirs[0](**expected).logits[mask]
        torch.testing.assert_close(ours[0](**got).logits[mask], logits, atol=1e-5, rtol=1e-5)


def test_a_packed_row_gives_the_logits_of_its_items_alone(ours: tuple[Any, Any]) -> None:
    model, processor = ours
    sizes = [[(300, 80)], [], [(60, 200), (1, 1)]]
    alone = [
        processor(images=[draw_image(*size) for size in images] or None, text=_prompt(len(images)), return_tensors="pt")
        for images in sizes
    ]
    ids = [one["input_ids"][0] for one in alone]
    assert enable_packing(model)
    arguments = packed_arguments(tuple(map(len, ids)), model, torch.device("cpu"))
    images = {
        "pixel_values": torch.cat([one["pixel_values"] for one in alone if "pixel_values" in one]),
        "image_layouts": [
            tuple(row) for one in alone if "image_layouts" in one for row in one["image_layouts"].tolist()
        ],
    }
    with torch.no_grad():
        packed = model(input_ids=torch.cat(ids)[None], **images, **arguments).logits[0]
        for one, logits in zip(alone, torch.split(packed, [len(row) for row in ids]), strict=True):
            torch.testing.assert_close(logits, model(**one).logits[0], atol=1e-5, rtol=1e-5)


def test_answers_are_the_greedy_ones_of_stock(theirs: tuple[Any, Any], ours: tuple[Any, Any]) -> None:
    """One by one, by the engine in a batch of different grids, and by transformers' own ``generate``."""
    sampling = Sampling(temperature=0.0, max_new_tokens=6)
    chat = Chat(Engine(*ours))
    images = [draw_image(*size) for size in ((300, 80), (60, 200), (90, 91), (1, 1))]
    question = "What is written?"
    requests = [chat.request(image, question, sampling=sampling) for image in images]
    assert len({len(request.images[0].pixels) for request in requests}) > 1
    answers = chat.answer(requests)
    options = {"max_new_tokens": 6, "do_sample": False}
    text = f"<s>{VICUNA_SYSTEM_PROMPT} {_prompt(1).replace('What is written?', question)}"
    for image, request, answer in zip(images, requests, answers, strict=True):
        inputs = stock_inputs(theirs[1], [image], [text])
        assert torch.equal(inputs["input_ids"][0], request.ids)
        expected = theirs[0].generate(**inputs, **options)
        assert answer.ids == tuple(expected[0, len(request.ids) :].tolist())
        inputs = ours[1](images=[image], text=text, return_tensors="pt")
        assert torch.equal(ours[0].generate(**inputs, **options), expected)


def test_the_stock_layout_comes_out_as_it_went_in(stock: Path, theirs: tuple[Any, Any], tmp_path: Path) -> None:
    export(stock, tmp_path / "ours", to="llavar")
    export(tmp_path / "ours", tmp_path / "again", to="hf-llava")
    before, after = (read_tensors(folder) for folder in (stock, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    model, processor = open_stock(tmp_path / "again")
    assert model.config.image_grid_pinpoints == theirs[0].config.image_grid_pinpoints
    assert processor.image_processor.image_grid_pinpoints == PINPOINTS
    image = draw_image(90, 200)
    expected, got = (stock_inputs(one, [image], [_prompt(1)]) for one in (theirs[1], processor))
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    with torch.no_grad():
        assert torch.equal(model(**got).logits, theirs[0](**expected).logits)


def test_a_siglip_with_tiles_gives_the_logits_of_stock(tmp_path: Path) -> None:
    model, processor = open_stock(save_llava_next(tmp_path / "stock", tower="siglip_vision_model"))
    own, own_processor = build_model(ModelConfig(checkpoint=str(tmp_path / "stock"), dtype="float32"))
    image = draw_image(300, 80)
    expected = stock_inputs(processor, [image], [_prompt(1)])
    got = own_processor(images=[image], text=_prompt(1), add_special_tokens=False, return_tensors="pt")
    assert torch.equal(got["input_ids"], expected["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(own(**got).logits, model(**expected).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("form", "tower_kind"), [("linear", "siglip"), ("two-sided", "clip_vision_model")])
def test_a_model_from_parts_with_tiles_is_exported_with_its_single_layer(
    form: Any, tower_kind: str, tower: Callable[[str], str], tmp_path: Path
) -> None:
    """A new LLaVAR, whose projector is one layer that the stock layout writes as two."""
    parts = ModelConfig(
        language_model=str(save_llama(tmp_path / "vicuna", width=64)), vision_tower=tower(tower_kind),
        dtype="float32", resolution=Tiles(max_tiles=3),
    )  # fmt: skip
    own, own_processor = build_model(parts)
    own.save_pretrained(tmp_path / "model")
    own_processor.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "stock", to="hf-llava", projector=form)
    model, processor = open_stock(tmp_path / "stock")
    image = draw_image(300, 80)
    text = "What is <im_start><im_patch><im_end> this?"
    expected = stock_inputs(processor, [image], [text])
    got = own_processor(images=[image], text="What is <image> this?", add_special_tokens=False, return_tensors="pt")
    assert torch.equal(got["input_ids"], expected["input_ids"])
    again, _ = build_model(ModelConfig(checkpoint=str(tmp_path / "stock"), dtype="float32"))
    with torch.no_grad():
        torch.testing.assert_close(model(**expected).logits, own(**got).logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(again(**got).logits, own(**got).logits)
    assert again.config.tiles.grids == own.config.tiles.grids


@pytest.mark.parametrize(("kind", "adds_bos"), [("mistral", True), ("34b", False)])
def test_the_templates_of_the_hub_give_the_prompts_of_stock(kind: str, adds_bos: bool, tmp_path: Path) -> None:
    """Also after the model went through our layout."""
    save_llava_next(tmp_path / "stock", template=TEMPLATES[kind], adds_bos=adds_bos)
    export(tmp_path / "stock", tmp_path / "ours", to="llavar")
    export(tmp_path / "ours", tmp_path / "again", to="hf-llava")
    image = draw_image(90, 200)
    talk: Any = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A sign."}]},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    stock, again = (LlavaNextProcessor.from_pretrained(tmp_path / name) for name in ("stock", "again"))
    text = stock.apply_chat_template(talk, add_generation_prompt=True)
    assert again.apply_chat_template(talk, add_generation_prompt=True) == text
    expected = stock_inputs(stock, [image], [text])["input_ids"][0]
    assert stock_inputs(again, [image], [text])["input_ids"][0].tolist() == expected.tolist()
    for folder in ("stock", "ours"):
        _, processor = build_model(ModelConfig(checkpoint=str(tmp_path / folder)))
        tokens = int((expected == processor.image_token_id).sum())
        found = processor.encode_question("And now?", history=[("What?", "A sign.")], num_image_tokens=tokens)
        assert found[0].tolist() == expected.tolist()
