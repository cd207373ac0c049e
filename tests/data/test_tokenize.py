"""Ids and labels of records: those of the original for ordinary records, and the documented ones for the rest."""

import dataclasses
import gzip
import json
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llavar_peft.constants import IGNORE_INDEX, IMAGE_PATCH_TOKEN
from llavar_peft.data.conversation_template import LLAVA_V1
from llavar_peft.data.encode_record import encode_record
from llavar_peft.data.supervised_text import decode_supervision
from llavar_peft.data.text_encoder import text_encoder, valid_unicode
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from llavar_peft.types import Example

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization"
CASES = [json.loads(line) for line in gzip.decompress((GOLDEN / "public.jsonl.gz").read_bytes()).splitlines()]
SPECIAL = ["</s>", "<s>", "<unk>", "<im_patch>", "<im_start>", "<im_end>", " ASSISTANT: ", "USER:", "</", "s>"]
TEXT = st.lists(
    st.sampled_from([*SPECIAL, " ", "\n", "the", "é", "\U0001f600", "x", "\ud83d"]) | st.text(max_size=5)
).map("".join)


@dataclass
class Settings:
    """A processor as the data code sees it."""

    tokenizer: Any
    image_processor: Any = None
    image_mode: str = "pad"
    inference_image_mode: str = "pad"
    patch_size: int = 14
    use_im_start_end: bool = True
    sep_image_conv_front: bool = False
    num_image_tokens: int = 4
    tile_geometry: None = None
    detail_grid: None = None
    image_token: str = IMAGE_PATCH_TOKEN
    conversation_template: Any = LLAVA_V1


@pytest.fixture(scope="module")
def small() -> Settings:
    tokenizer = load_tokenizer(GOLDEN / "small")
    add_image_tokens(tokenizer)
    return Settings(tokenizer)


@pytest.fixture(scope="module")
def llama(shared_dir: Path) -> Any:
    folder = shared_dir / "reference" / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"LLaMA's tokenizer.model is not at {folder}")
    tokenizer = load_tokenizer(folder)
    add_image_tokens(tokenizer)
    return tokenizer


def record(*texts: str, image: str | list[str] | None = None) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": "r", "conversations": turns, **({} if image is None else {"image": image})}


def decoded(example: Example, processor: Settings) -> str:
    return "".join(text for text, _ in decode_supervision(example, processor))


def answers(example: Example, processor: Settings) -> list[str]:
    return [text for text, supervised in decode_supervision(example, processor) if supervised]


# ---- parity with the original


def _settings(llama: Any, config: Mapping[str, Any]) -> Settings:
    return Settings(
        llama,
        num_image_tokens=config["image_token_len"],
        use_im_start_end=config["use_im_start_end"],
        sep_image_conv_front=config["sep_image_conv_front"],
    )


@pytest.mark.parity
@pytest.mark.parametrize("case", [c for c in CASES if c["group"] == "main"], ids=lambda c: c["id"])
def test_ordinary_records_match_the_original(llama: Any, case: dict[str, Any]) -> None:
    example = encode_record(case["sample"], _settings(llama, case["config"]), case["config"]["model_max_length"])
    assert example.input_ids.tolist() == case["input_ids"]
    assert example.labels.tolist() == case["labels"]
    assert (example.dropped is None) == (case["n_supervised"] > 0)


@pytest.mark.parity
def test_records_that_the_original_ignores_keep_their_labels(llama: Any) -> None:
    quirks = {case["id"]: case for case in CASES if case["group"] == "quirks"}
    assert all(case["warning"] and case["n_supervised"] == 0 for case in quirks.values())
    expected = {
        "q_assistant_with_spaces": [" Sure.</s>"],
        "q_answer_eos_text": [" The token is </s> in LLaMA.</s>"],
        "q_empty_answer": [],
    }
    for name, case in quirks.items():
        processor = _settings(llama, case["config"])
        example = encode_record(case["sample"], processor, 2048)
        assert answers(example, processor) == expected[name]
        if "</s>" not in json.dumps(case["sample"]):
            assert example.input_ids.tolist() == case["input_ids"]


# ---- what is supervised


def test_answers_and_their_end_tokens_are_supervised(small: Settings) -> None:
    example = encode_record(record("Who?\n<image>", "Emma.", "And?", " two\n words "), small, 2048)
    assert answers(example, small) == [" Emma.</s>", "  two\n words </s>"]
    assert example.supervised == int((example.labels != IGNORE_INDEX).sum())
    kept = example.labels != IGNORE_INDEX
    assert torch.equal(example.labels[kept], example.input_ids[kept])


def test_a_last_human_turn_is_encoded_but_not_supervised(small: Settings) -> None:
    example = encode_record(record("Q", "A", "And?"), small, 2048)
    assert answers(example, small) == [" A</s>"]
    assert decoded(example, small).endswith(" A</s>USER: And? ")


def test_a_leading_answer_is_dropped(small: Settings) -> None:
    raw = record("Q", "A")
    raw["conversations"].insert(0, {"from": "gpt", "value": "Welcome!"})
    assert torch.equal(
        encode_record(raw, small, 2048).input_ids, encode_record(record("Q", "A"), small, 2048).input_ids
    )


def test_an_empty_answer_is_not_supervised_and_the_others_are(small: Settings) -> None:
    example = encode_record(record("Q", "", "R", "B"), small, 2048)
    assert answers(example, small) == [" B</s>"]
    assert decoded(example, small).endswith("USER: Q ASSISTANT:USER: R ASSISTANT: B</s>")


@pytest.mark.parametrize(
    ("texts", "image", "max_length", "reason"),
    [
        (("Q", ""), None, 2048, "empty_answer"),
        (("Q",), None, 2048, "no_answer"),
        (("Q" * 400, "A"), None, 64, "truncated_before_answer"),
        (("<image>\nQ", "A"), "a.jpg", -4, "truncated_in_image"),
    ],
)
def test_the_reason_for_dropping_a_record(
    small: Settings, texts: tuple[str, ...], image: str | None, max_length: int, reason: str
) -> None:
    if max_length < 0:  # cuts through the image
        whole = encode_record(record(*texts, image=image), small, 2048)
        max_length = whole.input_ids.tolist().index(small.tokenizer.convert_tokens_to_ids("<im_end>"))
    example = encode_record(record(*texts, image=image), small, max_length)
    assert example.dropped == reason
    assert example.supervised == 0
    assert len(example.input_ids) > 0


# ---- images


def test_images_are_placed_in_order(small: Settings) -> None:
    example = encode_record(record("<image> a <image>\nb", "A", "<image>", "B", image=["1", "2", "3"]), small, 2048)
    assert example.images == ("1", "2", "3")
    assert example.image_token_counts == (4, 4, 4)
    assert decoded(example, small).endswith(
        "USER:[image x4]a[image x4]b ASSISTANT: A</s>USER:[image x4]ASSISTANT: B</s>"
    )


def test_a_single_image_is_used_for_every_placeholder(small: Settings) -> None:
    example = encode_record(record("<image><image>\nb", "A", image="1"), small, 2048)
    assert example.images == ("1", "1")
    assert decoded(example, small).endswith("USER:[image x4][image x4]b ASSISTANT: A</s>")


def test_images_that_cannot_fit_take_no_memory(small: Settings) -> None:
    """The same ids, labels and images as with all placeholders."""
    few, many = (encode_record(record("<image>" * count + "b", "A", image="1"), small, 64) for count in (80, 30_000))
    assert torch.equal(few.input_ids, many.input_ids)
    assert (few.images, few.dropped) == (many.images, many.dropped)
    wide = dataclasses.replace(small, num_image_tokens=576)
    tracemalloc.start()
    assert len(encode_record(record("<image>" * 30_000 + "b", "A", image="1"), wide, 2048).images) == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000_000


def test_an_image_without_a_placeholder_is_not_used(small: Settings) -> None:
    assert encode_record(record("b", "A", image="1"), small, 2048).images == ()


def test_more_placeholders_than_images_is_an_error(small: Settings) -> None:
    with pytest.raises(DataError, match=r"number of <image> is wrong \(got 3, expected 2"):
        encode_record(record("<image><image><image>", "A", image=["1", "2"]), small, 2048)


def test_without_an_image_the_placeholder_is_text(small: Settings) -> None:
    example = encode_record(record("write <image> here", "A"), small, 2048)
    assert "USER: write <image> here ASSISTANT: A</s>" in decoded(example, small)


def test_the_placeholder_in_an_answer_is_text(small: Settings) -> None:
    example = encode_record(record("<image>\nQ", "see <image> there", image="1"), small, 2048)
    assert answers(example, small) == [" see <image> there</s>"]
    assert example.image_token_counts == (small.num_image_tokens,)
    several = record("<image> a <image>", "![figure](<image>)", image=["1", "2"])
    assert len(encode_record(several, small, 2048).images) == 2


def test_images_are_moved_to_the_front_of_the_first_turn(small: Settings) -> None:
    front = Settings(small.tokenizer, sep_image_conv_front=True)
    example = encode_record(record(" Who?\n<image> ", "A", image="1"), front, 2048)
    assert decoded(example, front).endswith("USER:[image x4]USER: Who? ASSISTANT: A</s>")
    example = encode_record(record("<image>a<image>", "A", "no", "B", image=["1", "2"]), front, 2048)
    assert decoded(example, front).endswith(
        "USER:[image x4][image x4]USER: a ASSISTANT: A</s>USER: no ASSISTANT: B</s>"
    )


def test_mode_keep_needs_the_image_folder(small: Settings) -> None:
    keep = Settings(small.tokenizer, image_mode="keep")
    with pytest.raises(DataError, match="no image folder was given"):
        encode_record(record("<image>", "A", image="1"), keep, 2048)


def test_mode_keep_measures_the_number_of_image_tokens(small: Settings) -> None:
    from transformers import CLIPImageProcessorPil

    class Folder:
        def open(self, path: str) -> Image.Image:
            return Image.new("RGB", {"wide": (800, 400), "square": (500, 500)}[path])

    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    keep = Settings(small.tokenizer, image_mode="keep", image_processor=processor)
    raw = record("<image><image>", "A", image=["wide", "square"])
    # 448 x 224 and 224 x 224 pixels, patches of 14.
    assert encode_record(raw, keep, 2048, roots=Folder()).image_token_counts == (32 * 16, 16 * 16)


# ---- truncation


def test_truncation_never_cuts_through_an_image(small: Settings) -> None:
    raw = record("a\n<image>", "A", "<image>\nb", "B", image=["1", "2"])
    whole = encode_record(raw, small, 2048)
    ids = whole.input_ids.tolist()
    start, end = (small.tokenizer.convert_tokens_to_ids(name) for name in ("<im_start>", "<im_end>"))
    for max_length in range(1, len(ids) + 2):
        example = encode_record(raw, small, max_length)
        cut = example.input_ids.tolist()
        assert cut == ids[: len(cut)]
        assert torch.equal(example.labels, whole.labels[: len(cut)])
        assert len(cut) <= max_length
        assert cut.count(start) == cut.count(end) == len(example.images) == len(example.image_token_counts)
        inside = ids[:max_length].count(start) > ids[:max_length].count(end)
        assert inside == (len(cut) < min(max_length, len(ids)))
        assert (example.dropped is None) == (example.supervised > 0)


def test_a_length_below_one_is_rejected(small: Settings) -> None:
    with pytest.raises(ConfigError, match="max_length"):
        encode_record(record("Q", "A"), small, 0)


def test_a_tokenizer_without_image_tokens_is_rejected() -> None:
    with pytest.raises(ConfigError, match="<im_patch>"):
        encode_record(record("Q", "A"), Settings(load_tokenizer(GOLDEN / "small")), 64)


# ---- for any text


@given(question=TEXT, answer=TEXT, second=TEXT, image=st.booleans(), use_im_start_end=st.booleans())
def test_text_never_becomes_a_special_token(
    small: Settings, question: str, answer: str, second: str, image: bool, use_im_start_end: bool
) -> None:
    processor = Settings(small.tokenizer, use_im_start_end=use_im_start_end)
    texts = (f"{question}\n<image>" if image else question, answer, "again", second)
    example = encode_record(record(*texts, image="1" if image else None), processor, 10**6)
    ids = example.input_ids.tolist()
    ends = (answer != "") + (second != "")
    names = ["<unk>", "<s>", "</s>", "<im_patch>", "<im_start>", "<im_end>"]
    counts = [ids.count(small.tokenizer.convert_tokens_to_ids(name)) for name in names]
    framed = int(image and use_im_start_end)
    assert counts == [0, 1, ends, 4 * image, framed, framed]


@given(answer=TEXT.filter(bool), question=TEXT)
def test_the_labels_decode_to_the_answer(small: Settings, question: str, answer: str) -> None:
    example = encode_record(record(question, answer), small, 10**6)
    whole = answer.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert "".join(answers(example, small)) == f" {whole}</s>".replace("▁", " ")


@given(text=st.text(alphabet="ab \n▁é\U0001f600<s>/", min_size=1, max_size=30) | TEXT.filter(bool), data=st.data())
def test_encoding_word_by_word_gives_the_ids_of_the_whole_text(small: Settings, text: str, data: st.DataObject) -> None:
    encoder = text_encoder(small)
    text = valid_unicode(text)
    start = data.draw(st.none() | st.integers(0, len(text)))
    assert encoder.words is not None
    assert encoder.encode(text, start) == dataclasses.replace(encoder, words=None).encode(text, start)


def test_tokens_across_words_disable_encoding_word_by_word(small: Settings) -> None:
    """Vocabularies other than LLaMA's may have a token that crosses a word boundary."""
    form = json.loads(small.tokenizer.backend_tokenizer.to_str())
    form["model"]["vocab"]["e▁s"] = len(small.tokenizer)
    form["model"]["merges"].insert(0, ["e", "▁s"])
    form["model"]["merges"].insert(0, ["▁", "s"])
    form["model"]["vocab"].setdefault("▁s", len(small.tokenizer) + 1)
    backend = Tokenizer.from_str(json.dumps(form))
    joined = Settings(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
    encoder = text_encoder(joined)
    assert encoder.words is None
    assert form["model"]["vocab"]["e▁s"] in encoder.encode("the sun")[0]
