"""Text as it comes is the whole decoding, in whole characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavar_peft.inference.detokenize import TextStream
from llavar_peft.models.tokenizer import add_image_tokens, load_tokenizer
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


@given(data=st.data(), which=st.sampled_from([0, 1]))
def test_any_tokens(data: st.DataObject, which: int) -> None:
    tokenizer = TOKENIZERS[which]
    # Special tokens and bytes are the first 259, the image tokens the last 3.
    token = (
        st.integers(0, 260) | st.integers(0, len(tokenizer) - 1) | st.integers(len(tokenizer) - 3, len(tokenizer) - 1)
    )
    ids = data.draw(st.lists(token, max_size=40))
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
