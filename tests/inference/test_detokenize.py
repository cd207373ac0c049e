"""Text as it comes is the whole decoding, in whole characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llavar_peft.inference.text_stream import TextStream, bytes_of_tokens
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from tests.weights.adapters import LANGUAGE_MODEL

SENTENCEPIECE = Path(__file__).parents[1] / "golden/tokenization/small"


def _load(folder: Path) -> Any:
    tokenizer = load_tokenizer(str(folder))
    add_image_tokens(tokenizer)
    return tokenizer


TOKENIZERS = [_load(LANGUAGE_MODEL), _load(SENTENCEPIECE)]


def _stream(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.add(token) for token in ids]
    pieces.append(stream.close())
    assert stream.text == "".join(pieces)
    return pieces, stream.stopped


@pytest.fixture(scope="session")
def llama(shared_dir: Path) -> Any:
    folder = shared_dir / "reference/tokenizer"
    if not folder.is_dir():
        pytest.skip(f"LLaMA's tokenizer.model is not at {folder}")
    return _load(folder)


def _ids(data: st.DataObject, tokenizer: Any) -> list[int]:
    # Special tokens and bytes are the first 259, the image tokens the last 3.
    token = (
        st.integers(0, 260) | st.integers(0, len(tokenizer) - 1) | st.integers(len(tokenizer) - 3, len(tokenizer) - 1)
    )
    # UTF-8 over several tokens would rarely occur at random.
    run_of_bytes = st.text(max_size=3).map(lambda text: [3 + byte for byte in text.encode()])
    parts = data.draw(st.lists(token.map(lambda one: [one]) | run_of_bytes, max_size=30))
    return [one for part in parts for one in part]


@given(data=st.data(), which=st.sampled_from([0, 1]))
def test_any_tokens(data: st.DataObject, which: int) -> None:
    tokenizer = TOKENIZERS[which]
    ids = _ids(data, tokenizer)
    whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
    pieces, _ = _stream(tokenizer, ids)
    assert "".join(pieces) == whole
    stop = data.draw(st.text(st.sampled_from(whole or "x"), min_size=1, max_size=3))
    cut, stopped = _stream(tokenizer, ids, (stop,))
    raw = tokenizer.decode(ids, skip_special_tokens=True)
    assert stopped == (stop in raw)
    assert "".join(cut) == raw.partition(stop)[0].strip()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_never_half_a_character(tokenizer: Any) -> None:
    text = "naïve 日本語 🙂🙃 a\u0301 end"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, _ = _stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 5


def _check_bytes(data: st.DataObject, tokenizer: Any) -> None:
    ids = _ids(data, tokenizer)
    raw = tokenizer.decode(ids, skip_special_tokens=True)
    stop = data.draw(st.none() | st.text(st.sampled_from(raw or "x"), min_size=1, max_size=3))
    stream = TextStream(tokenizer, () if stop is None else (stop,))
    said = []
    for token in ids:
        said.append(token)
        stream.add(token)
        if stream.stopped:
            break
    stream.close()
    parts = bytes_of_tokens(tokenizer, said, stream.text)
    assert len(parts) == len(said)
    assert b"".join(parts).decode() == stream.text
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token, part in zip(said, parts, strict=True):
        if token in special:
            assert part == b""
        elif 3 <= token < 259:  # itself, nothing, or the sign for what is no UTF-8
            assert part in (bytes([token - 3]), b"", "\ufffd".encode())
        else:
            assert part.decode() in tokenizer.convert_ids_to_tokens(token).replace("▁", " ")


@given(data=st.data(), which=st.sampled_from([0, 1]))
def test_each_token_has_its_bytes_of_the_text(data: st.DataObject, which: int) -> None:
    _check_bytes(data, TOKENIZERS[which])


@pytest.mark.slow
@given(data=st.data())
def test_each_of_llamas_tokens_has_its_bytes_of_the_text(data: st.DataObject, llama: Any) -> None:
    _check_bytes(data, llama)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_characters_over_several_tokens_are_single_bytes(tokenizer: Any) -> None:
    smile = [3 + byte for byte in "🙂".encode()]
    (word,) = (index for piece, index in tokenizer.get_vocab().items() if piece == "▁the")
    ids = [3 + ord(" "), word, *smile, word, *smile[:3], tokenizer.eos_token_id]
    text = "the🙂 the\ufffd\ufffd\ufffd"
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    smiles = [bytes([byte]) for byte in "🙂".encode()]
    assert bytes_of_tokens(tokenizer, ids, text) == [
        b"", b"the", *smiles, b" the", *["\ufffd".encode()] * 3, b"",
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_character_of_several_byte_level_tokens_is_whole(cut: int) -> None:
    """Without its last tokens, an answer may end within a character: only then is there a replacement character."""
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL.parents[1] / "tiny_modern/language_model")
    ids = tokenizer.encode("Zürich, 日本 € \U0001f388")
    ids = ids[: len(ids) - cut]
    pieces, _ = _stream(tokenizer, ids)
    whole = tokenizer.decode(ids).strip()
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert b"".join(bytes_of_tokens(tokenizer, ids, whole)) == whole.encode()
