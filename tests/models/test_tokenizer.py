"""The repaired tokenizer gives SentencePiece's ids for any text."""

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llavar_peft import ModelConfig, build_model
from llavar_peft.constants import ADDED_TOKENS, IMAGE_PATCH_TOKEN
from llavar_peft.errors import ConfigError, MissingDependencyError, WeightsError
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenization"
SMALL = GOLDEN / "small"
# Text in which pieces, special tokens, spaces and bytes meet often.
TEXT = st.text() | st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "</s>", "</", "s>", "<s>", "<", "a", "=", "the", "▁", "é", "字", "\U0001f600", "0"]
    )
).map("".join)


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(SMALL)
    add_image_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def pieces() -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=str(SMALL / "tokenizer.model"))


def _real(shared_dir: Path) -> Path:
    folder = shared_dir / "reference" / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"LLaMA's tokenizer.model is not at {folder}")
    return folder


@given(text=TEXT.filter(lambda text: "\0" not in text))
def test_ids_equal_those_of_sentencepiece(small: PreTrainedTokenizerFast, pieces: Any, text: str) -> None:
    assert small.encode(text, add_special_tokens=False, split_special_tokens=True) == pieces.encode(text)


def test_text_never_merges_into_a_special_token(small: PreTrainedTokenizerFast) -> None:
    vocabulary = small.get_vocab()
    assert "</" in vocabulary
    assert "s>" in vocabulary, "the small model must be able to spell </s> from two pieces, or this tests nothing"
    assert not {0, 1, 2} & set(small.encode("</s> a</s> <s> <unk>", split_special_tokens=True))


def test_image_tokens_get_the_next_ids_once() -> None:
    tokenizer = load_tokenizer(SMALL)
    size = len(tokenizer)
    assert add_image_tokens(tokenizer) == 3
    assert add_image_tokens(tokenizer) == 0
    assert [tokenizer.convert_tokens_to_ids(name) for name in ADDED_TOKENS] == [size, size + 1, size + 2]


def test_without_start_and_end_only_the_patch_token_is_added() -> None:
    tokenizer = load_tokenizer(SMALL)
    assert add_image_tokens(tokenizer, use_im_start_end=False) == 1
    assert tokenizer.get_added_vocab().keys() >= {IMAGE_PATCH_TOKEN}
    assert "<im_start>" not in tokenizer.get_vocab()


def test_image_tokens_without_consecutive_ids_are_rejected() -> None:
    tokenizer = load_tokenizer(SMALL)
    add_image_tokens(tokenizer, use_im_start_end=False)
    tokenizer.add_tokens(["<other>"])
    with pytest.raises(WeightsError, match="consecutive"):
        add_image_tokens(tokenizer)


def test_settings_equal_the_original_s(small: PreTrainedTokenizerFast) -> None:
    assert small.padding_side == "right"
    assert (small.pad_token_id, small.bos_token_id, small.eos_token_id) == (0, 1, 2)
    assert small("the").input_ids == small.encode("the", add_special_tokens=False), "<s> is not added by itself"


@pytest.mark.parametrize("model_type", [None, "llama", "llava", "llavar"])
def test_auto_tokenizer_loads_a_saved_tokenizer(
    small: PreTrainedTokenizerFast, tmp_path: Path, model_type: str | None
) -> None:
    small.save_pretrained(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "the sign <im_start><im_patch><im_end>\n  USER: a</s>the  é字"
    for opened in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert opened(text).input_ids == small(text).input_ids
        assert len(opened) == len(small)
        assert opened.padding_side == "right"


def test_tokenizer_model_is_preferred_to_a_tokenizer_json(small: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    shutil.copy(SMALL / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_end>": 642, "<im_patch>": 640, "<im_start>": 641}))
    opened = load_tokenizer(tmp_path)
    assert add_image_tokens(opened) == 0
    assert opened.backend_tokenizer.to_str() == small.backend_tokenizer.to_str()


def test_ids_of_a_tokenizer_config_are_kept(tmp_path: Path) -> None:
    """Checkpoints with a row for ``[PAD]`` have shifted image tokens, which only this file may state."""
    shutil.copy(SMALL / "tokenizer.model", tmp_path)
    tokens = {"0": "<unk>", "1": "<s>", "2": "</s>", "640": "[PAD]", "641": "<im_patch>", "642": "<im_start>"}
    stated = {index: {"content": content} for index, content in {**tokens, "643": "<im_end>"}.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": stated}))
    tokenizer = load_tokenizer(tmp_path)
    assert add_image_tokens(tokenizer) == 0
    assert [tokenizer.convert_tokens_to_ids(name) for name in ("[PAD]", "<im_patch>", "<im_end>")] == [640, 641, 643]


@pytest.mark.parametrize("stated", [None, "added_tokens.json", "tokenizer_config.json"])
def test_a_language_model_with_a_row_for_padding_gets_its_image_tokens_after_it(
    stated: str | None, tmp_path: Path
) -> None:
    """As many Vicuna and Alpaca folders have: 32001 rows, of which the last is ``[PAD]``'s."""
    plain = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL)
    rows = plain.config.vocab_size
    plain.resize_token_embeddings(rows + 1, mean_resizing=False)
    plain.save_pretrained(tmp_path)
    shutil.copy(LANGUAGE_MODEL / "tokenizer.json", tmp_path)
    if stated == "added_tokens.json":
        (tmp_path / stated).write_text(json.dumps({"[PAD]": rows}))
    elif stated:
        pad = {"content": "[PAD]", "special": True}
        (tmp_path / stated).write_text(json.dumps({"added_tokens_decoder": {str(rows): pad}}))
    model, processor = build_model(ModelConfig(language_model=str(tmp_path), vision_tower=str(VISION_TOWER)))
    first = rows + bool(stated)  # a row without a token is taken
    assert [processor.tokenizer.convert_tokens_to_ids(name) for name in ADDED_TOKENS] == [first, first + 1, first + 2]
    assert model.get_input_embeddings().weight.shape[0] == first + 3
    if stated:
        assert processor.tokenizer.convert_tokens_to_ids("[PAD]") == rows


def test_added_tokens_with_other_ids_are_rejected(tmp_path: Path) -> None:
    shutil.copy(SMALL / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_patch>": 700}))
    with pytest.raises(WeightsError, match="got 640, expected 700"):
        load_tokenizer(tmp_path)


def test_a_stock_conversion_is_rejected(small: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    form = json.loads(small.backend_tokenizer.to_str())
    form["normalizer"] = None
    form["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    with pytest.raises(WeightsError, match=r"pre-tokenizer.*tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 100])
def test_a_damaged_model_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(WeightsError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="not a folder"):
        load_tokenizer(tmp_path / "nothing")


def test_a_missing_sentencepiece_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingDependencyError, match="pip install sentencepiece"):
        load_tokenizer(SMALL)


def test_a_unigram_model_is_rejected(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the sign says stop", "who wrote the book"] * 50),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(WeightsError, match="not a LLaMA tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parity
def test_the_repaired_tokenizer_gives_the_original_s_ids_on_whole_prompts(shared_dir: Path) -> None:
    tokenizer = load_tokenizer(_real(shared_dir))
    add_image_tokens(tokenizer)
    assert [tokenizer.convert_tokens_to_ids(name) for name in ADDED_TOKENS] == [32000, 32001, 32002]
    checked = 0
    for name in ("public", "inference"):
        for line in gzip.decompress((GOLDEN / f"{name}.jsonl.gz").read_bytes()).decode().splitlines():
            case = json.loads(line)
            if case.get("group") != "quirks" and case.get("config", case)["use_im_start_end"]:
                ids = [1, *tokenizer(case["prompt"]).input_ids]
                assert ids[: len(case["input_ids"])] == case["input_ids"], case.get("id", case["prompt"])
                checked += 1
    assert checked == 30


@pytest.mark.parity
def test_a_released_checkpoint_s_tokenizer_is_the_same(shared_dir: Path) -> None:
    tokenizer = load_tokenizer(_real(shared_dir))
    add_image_tokens(tokenizer)
    released = load_tokenizer(shared_dir / "golden" / "model" / "llava-tiny-v1")
    assert add_image_tokens(released) == 0
    assert released.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
