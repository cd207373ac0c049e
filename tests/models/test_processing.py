"""The processor: the original's inference prompts, and the behavior of a transformers processor."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor, CLIPImageProcessorPil

from llavar_peft.constants import EOS_TOKEN, IMAGE_PLACEHOLDER
from llavar_peft.data.conversation_template import conversation_pieces, image_block, split_placeholders
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.models.build_model import register
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from llavar_peft.models.processing_llavar import LlavarProcessor

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization"
INFERENCE = [json.loads(line) for line in gzip.decompress((GOLDEN / "inference.jsonl.gz").read_bytes()).splitlines()]
CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "Read it."}, {"type": "image"}]},
    {"role": "assistant", "content": "EXIT"},
    {"role": "user", "content": "And below?"},
    {"role": "assistant", "content": [{"type": "text", "text": "RIGHT LANE"}]},
]


def make(tokenizer: Any, side: int = 56, **settings: Any) -> LlavarProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavarProcessor(images, tokenizer, **settings)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    opened = load_tokenizer(GOLDEN / "small")
    add_image_tokens(opened)
    return opened


@pytest.fixture(scope="module")
def llama(shared_dir: Path) -> Any:
    folder = shared_dir / "reference" / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"LLaMA's tokenizer.model is not at {folder}")
    opened = load_tokenizer(folder)
    add_image_tokens(opened)
    return opened


@pytest.fixture
def image() -> Image.Image:
    return Image.new("RGB", (90, 40), (200, 30, 30))


# ---- prompts


@pytest.mark.parity
@pytest.mark.parametrize("case", INFERENCE, ids=lambda case: repr(case["query"]))
def test_questions_are_encoded_as_run_llava_does(llama: Any, case: dict[str, Any]) -> None:
    side = {576: 336, 256: 224, 0: 336}[case["image_token_len"]]
    processor = make(llama, side, use_im_start_end=case["use_im_start_end"])
    if case["text_only"]:
        ids = processor.encode_question("What is the capital of France?", image=False)
    elif case["query"].startswith("(two turns)"):
        ids = processor.encode_question("And below?", history=[("Read it.", "EXIT")])
    else:
        ids = processor.encode_question(case["query"])
    assert ids.tolist() == [case["input_ids"]]
    images = None if case["text_only"] else Image.new("RGB", (8, 8))
    assert processor(images, case["prompt"], return_tensors="pt")["input_ids"].tolist() == [case["input_ids"]]


@pytest.mark.parity
def test_questions_are_those_of_the_golden_answers(llama: Any, shared_dir: Path) -> None:
    for case in json.loads((shared_dir / "golden" / "generate" / "generate.json").read_text()):
        assert make(llama, 336).encode_question(case["query"]).tolist() == [case["input_ids"]]


def test_a_question_never_becomes_a_special_token(tokenizer: Any) -> None:
    processor = make(tokenizer)
    ids = processor.encode_question("</s><image> <im_patch> <im_start><unk>", history=[("<image></s>", "<s></s>")])
    special = [index for index in ids[0].tolist() if index in (0, 1, 2) or index >= 640]
    assert special == [1, 641, *[640] * 16, 642, 2]


def test_the_number_of_image_tokens_can_be_given(tokenizer: Any) -> None:
    processor = make(tokenizer)
    assert (processor.num_image_tokens, processor.image_token, processor.image_token_id) == (16, "<im_patch>", 640)
    assert processor.encode_question("a", num_image_tokens=6)[0].tolist().count(640) == 6


# ---- the chat template


def test_the_chat_template_writes_the_same_text(tokenizer: Any) -> None:
    turns = [("human", "Read it.\n<image>"), ("gpt", "EXIT"), ("human", "And below?"), ("gpt", "RIGHT LANE")]
    pieces = conversation_pieces([(role, split_placeholders(text)) for role, text in turns])
    special = {"image": IMAGE_PLACEHOLDER, "end": EOS_TOKEN}
    expected = "".join(special.get(piece.kind, piece.text) for piece in pieces)
    processor = make(tokenizer)
    assert processor.apply_chat_template(CHAT) == expected
    opened = processor.apply_chat_template(CHAT[:3], add_generation_prompt=True)
    assert opened == expected.removesuffix(f" RIGHT LANE{EOS_TOKEN}")


def test_the_order_of_a_message_s_parts_is_kept(tokenizer: Any) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]
    text = make(tokenizer).apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    assert text.endswith(" USER: <image>\nab\n<image> ASSISTANT:")


def test_a_system_message_replaces_the_system_text(tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert make(tokenizer).apply_chat_template(chat, add_generation_prompt=True) == "Be brief. USER: Hi ASSISTANT:"


def test_roles_must_alternate(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="alternate"):
        make(tokenizer).apply_chat_template([{"role": "assistant", "content": "Hi"}])


def test_a_chat_becomes_ids_and_a_mask_of_the_answers(tokenizer: Any, image: Image.Image) -> None:
    chat = [{"role": "user", "content": [CHAT[0]["content"][0], {"type": "image", "image": image}]}, *CHAT[1:]]
    processor = make(tokenizer)
    out = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    mask = out["assistant_masks"][0].bool()
    assert tokenizer.decode(out["input_ids"][0][mask]) == "EXIT</s> RIGHT LANE</s>"
    assert out["pixel_values"].shape == (1, 3, 56, 56)
    asked = processor.encode_question("And below?", history=[("Read it.", "EXIT")])[0]
    assert torch.equal(out["input_ids"][0][: len(asked)], asked)


# ---- calls


def test_images_replace_placeholders_in_order_over_a_batch(tokenizer: Any, image: Image.Image) -> None:
    processor = make(tokenizer)
    out = processor(
        [[image], [image, image]],
        ["a <image>", "<image> b <image>"],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert out["pixel_values"].shape == (3, 3, 56, 56)
    assert (out["input_ids"] == 640).sum(dim=1).tolist() == [16, 32]
    assert out["attention_mask"][0, 0] == 0
    assert out["attention_mask"][1].all()


def test_pixels_depend_on_the_image_mode(tokenizer: Any, image: Image.Image) -> None:
    padded = make(tokenizer)(image, return_tensors="pt")["pixel_values"]
    black = make(tokenizer, inference_image_mode="pad_black")(image, return_tensors="pt")["pixel_values"]
    assert padded.shape == black.shape == (1, 3, 56, 56)
    assert not torch.equal(padded, black)
    assert torch.equal(make(tokenizer)(image, image_mode="pad_black", return_tensors="pt")["pixel_values"], black)


def test_a_prompt_with_expanded_image_tokens_is_the_same(tokenizer: Any, image: Image.Image) -> None:
    processor = make(tokenizer)
    short = processor(image, "a\n<image> b")["input_ids"]
    assert processor(image, f"a\n{image_block(16, use_im_start_end=True)} b")["input_ids"] == short


@pytest.mark.parametrize(
    ("images", "text", "options", "message"),
    [
        (0, "a <image>", {}, "0 images for 1 <image>"),
        (2, "a <image>", {}, "2 images for 1 <image>"),
        (1, "<image> <im_patch>", {}, "contains <im_patch>"),
        (1, "<image>", {"truncation": True, "max_length": 4}, "cut an image's tokens"),
        (1, "<image>", {"paddin": True}, "unknown options paddin "),
        (1, "<image>", {"videos": [1]}, "got videos"),
        (0, None, {}, "neither images nor text"),
    ],
)
def test_inconsistent_input_is_rejected(
    tokenizer: Any, image: Image.Image, images: int, text: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make(tokenizer)([image] * images or None, text, **options)


# ---- construction, saving, loading


def test_a_saved_processor_is_loaded_unchanged(tokenizer: Any, tmp_path: Path, image: Image.Image) -> None:
    register()
    made = make(
        tokenizer,
        image_mode="keep",
        inference_image_mode="pad_black",
        use_im_start_end=False,
        sep_image_conv_front=True,
        patch_size=7,
    )
    made.save_pretrained(tmp_path)
    for opened in (LlavarProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(opened, LlavarProcessor)
        assert isinstance(opened.image_processor, CLIPImageProcessorPil)
        assert opened.to_dict() == made.to_dict()
        assert opened.chat_template == made.chat_template
        assert opened.num_image_tokens == 64
        assert opened.encode_question("a\n b").tolist() == made.encode_question("a\n b").tolist()
        assert torch.equal(opened(image)["pixel_values"], made(image)["pixel_values"])


def test_another_clip_image_processor_is_replaced_by_the_pillow_one(tokenizer: Any) -> None:
    images = CLIPImageProcessorPil(crop_size={"height": 28, "width": 28})

    class Other:
        def to_dict(self) -> dict[str, Any]:
            return {**images.to_dict(), "image_processor_type": CLIPImageProcessor.__name__}

    made = LlavarProcessor(Other(), tokenizer)
    assert isinstance(made.image_processor, CLIPImageProcessorPil)
    assert made.num_image_tokens == 4


def test_an_unknown_mode_is_rejected(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"image_mode.*'crop'.*pad"):
        make(tokenizer, image_mode="crop")
    with pytest.raises(ConfigError, match=r"inference_image_mode.*'black'"):
        make(tokenizer, inference_image_mode="black")


def test_a_tokenizer_without_image_tokens_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"<im_patch>.*add_image_tokens"):
        make(load_tokenizer(GOLDEN / "small"))
