"""LLaMA's tokenizer with exactly the ids of the original's slow tokenizer.

``transformers`` 5 converts a ``tokenizer.model`` into a tokenizer with different ids for most conversations. The fast
tokenizer is therefore built here from the SentencePiece model: merges are ordered by the pieces' scores, and by the
*legacy* rule each segment of text between special tokens starts with ``▁``. The result is a standard fast tokenizer:
once saved, any ``AutoTokenizer.from_pretrained`` loads it with the same ids.

Source: LLaVAR, llava/train/train.py (``use_fast=False``), on the slow ``LlamaTokenizer`` of transformers 4.28.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transformers import PreTrainedTokenizerFast

from llavar_peft.constants import (
    ADDED_TOKENS,
    BOS_TOKEN,
    EOS_TOKEN,
    IMAGE_PATCH_TOKEN,
    PAD_TOKEN,
    UNK_TOKEN,
)
from llavar_peft.errors import (
    DAMAGED,
    ConfigError,
    LlavarError,
    MissingDependencyError,
    WeightsError,
    describe_reason,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_SPACE: Final = "▁"
_MODEL_FILE: Final = "tokenizer.model"
_JSON_FILE: Final = "tokenizer.json"
_ADDED_FILE: Final = "added_tokens.json"
_CONFIG_FILE: Final = "tokenizer_config.json"
_NORMALIZER: Final[dict[str, Any]] = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}
_GIVE_MODEL: Final = (
    "copy the language model's own tokenizer.model into this folder (LLaMA and Vicuna are released with one)"
)
# Each probe covers a way in which a SentencePiece model can differ from LLaMA's: repeated spaces and spaces at the ends
# are kept, no Unicode normalization, byte pieces for unknown characters, no control pieces from text.
_PROBES: Final = (
    "The sign says STOP.",
    "  two  spaces   and more    ",
    "ﬁne ½ Ａ e\u0301 ①",
    "日本語 \U0001f600\U0001f469\u200d\U0001f467 \u0378\t\n\r",
    "a</s>b <s> <unk> <0x41> ▁x",
    "=" * 37 + " " * 21 + "aaaaaaaaaaa",
)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer whose ids are those of the original.

    ``tokenizer.model`` is used if it exists; a ``tokenizer.json`` in the same folder is then ignored, because a stock
    conversion gives different ids. Tokens of an ``added_tokens.json``, or else of a ``tokenizer_config.json``, are
    added with the ids that it states.

    Args:
        folder: A local folder with ``tokenizer.model``, or with a ``tokenizer.json`` that this package has written.

    Returns:
        A fast tokenizer that pads on the right with ``<unk>`` (id 0) and does not add ``<s>``.

    Raises:
        ConfigError: ``folder`` is not a folder, or contains neither file.
        WeightsError: The file is damaged, not a LLaMA tokenizer, or a conversion with different ids.
        MissingDependencyError: There is a ``tokenizer.model``, and ``sentencepiece`` is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError.at(str(folder), "not a folder (expected one with a tokenizer)", "give a local folder")
    if (folder / _MODEL_FILE).is_file():
        tokenizer = _wrap(_from_sentencepiece(folder / _MODEL_FILE))
    elif (folder / _JSON_FILE).is_file():
        tokenizer = _wrap(_from_json(folder / _JSON_FILE))
    else:
        raise ConfigError.at(str(folder), f"contains neither {_MODEL_FILE} nor {_JSON_FILE}", _GIVE_MODEL)
    _add_saved_tokens(tokenizer, folder)
    return tokenizer


def add_image_tokens(tokenizer: PreTrainedTokenizerFast, *, use_im_start_end: bool = True) -> int:
    """Add ``<im_patch>`` and, if used, ``<im_start>`` and ``<im_end>``, with the next ids in this order.

    With LLaMA's 32000 tokens the new ids are 32000, 32001 and 32002. Existing image tokens stay unchanged.

    Args:
        tokenizer: From ``load_tokenizer``; changed in place.
        use_im_start_end: Whether images are enclosed in ``<im_start>`` and ``<im_end>``.

    Returns:
        The number of new tokens, 0 to 3.

    Raises:
        WeightsError: The image tokens have ids that are not consecutive.
    """
    expected = ADDED_TOKENS if use_im_start_end else (IMAGE_PATCH_TOKEN,)
    known = tokenizer.get_vocab()
    new = tokenizer.add_tokens([_image_token(name) for name in expected if name not in known])
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[name] for name in expected]
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise WeightsError.at(
            str(tokenizer.name_or_path or "tokenizer"),
            f"the image tokens' ids are not consecutive (got {dict(zip(expected, ids, strict=True))})",
            "use the tokenizer of the language model or of a LLaVAR checkpoint, without other added tokens",
        )
    return int(new)


def _image_token(name: str) -> AddedToken:
    from tokenizers import AddedToken

    # The slow tokenizer strips whitespace on both sides of added tokens, but not of other special tokens.
    return AddedToken(name, lstrip=True, rstrip=True, normalized=False, special=True)


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    untyped: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    tokenizer: PreTrainedTokenizerFast = untyped(
        tokenizer_object=backend,
        unk_token=UNK_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def _from_sentencepiece(path: Path) -> Tokenizer:
    try:
        return _convert_pieces(_open_sentencepiece(path), path)
    except LlavarError:
        raise
    except Exception as error:  # a damaged model makes both libraries raise many types of exceptions
        raise _unreadable_model(path) from error


def _convert_pieces(pieces: Any, path: Path) -> Tokenizer:
    ids = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    missing = [name for name in (UNK_TOKEN, BOS_TOKEN, EOS_TOKEN) if name not in ids]
    if missing:
        raise WeightsError.at(str(path), f"not a LLaMA tokenizer: it has no {', '.join(missing)}", _GIVE_MODEL)
    backend = _assemble(ids, _merges(pieces, ids))
    for probe in _PROBES:
        if backend.encode(probe, add_special_tokens=False).ids != pieces.encode(probe):
            raise WeightsError.at(
                str(path),
                f"not a LLaMA tokenizer (BPE without normalization, bytes for unknown characters): the ids of "
                f"{probe!r} differ",
                _GIVE_MODEL,
            )
    # Added after the probes, in which they must be text as in SentencePiece.
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (UNK_TOKEN, BOS_TOKEN, EOS_TOKEN)])
    return backend


def _open_sentencepiece(path: Path) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise MissingDependencyError.at(
            str(path), "reading it needs sentencepiece, which is not installed", "run `pip install sentencepiece`"
        ) from error
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise _unreadable_model(path) from error


def _unreadable_model(path: Path) -> LlavarError:
    size = path.stat().st_size
    what = f"not readable as a SentencePiece model (got {size} bytes; LLaMA's has 499723)"
    return WeightsError.at(str(path), what, "download the file again")


def _merges(pieces: Any, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces to merge, ordered by SentencePiece score, then id.

    Control, unknown and byte pieces are neither merged nor the result of a merge, so text can never become one of them.
    """

    def plain(index: int) -> bool:
        return not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index))

    known = {piece: index for piece, index in ids.items() if plain(index)}
    ranked = sorted(known.items(), key=lambda item: (-pieces.get_score(item[1]), item[1]))
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _assemble(ids: Mapping[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    backend = Tokenizer(
        models.BPE(vocab=dict(ids), merges=merges, unk_token=UNK_TOKEN, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _from_json(path: Path) -> Tokenizer:
    """Load a ``tokenizer.json`` and check that it gives the original's ids."""
    from tokenizers import Tokenizer

    try:
        form = json.loads(path.read_text(encoding="utf-8"))
        backend = Tokenizer.from_str(json.dumps(form))
        Tokenizer.from_str(backend.to_str())  # as transformers copies it
    except Exception as error:  # tokenizers raises a bare Exception for an invalid file
        raise WeightsError.at(
            str(path), f"not readable as a tokenizer ({describe_reason(error)})", _GIVE_MODEL
        ) from error
    faults = []
    if form.get("model", {}).get("type") != "BPE":
        faults.append("the model is not BPE")
    if form.get("normalizer") != _NORMALIZER:
        faults.append("the normalizer does not prepend ▁ to each segment of text")
    if form.get("pre_tokenizer") is not None:
        faults.append("it has a pre-tokenizer")
    vocabulary = backend.get_vocab()
    faults += [f"it has no {name}" for name in (UNK_TOKEN, BOS_TOKEN, EOS_TOKEN) if name not in vocabulary]
    for token in backend.get_added_tokens_decoder().values():
        if token.content in ADDED_TOKENS and not (token.lstrip and token.rstrip and token.special):
            faults.append(f"{token.content} does not strip the whitespace around it")
    if faults:
        raise WeightsError.at(
            str(path), f"this conversion gives different ids than the original: {'; '.join(faults)}", _GIVE_MODEL
        )
    return backend


def _read_added_tokens(folder: Path) -> tuple[Path, dict[str, int]]:
    """Return the ids of the added tokens beside the tokenizer's own file, and the file that states them."""
    path = folder / _ADDED_FILE
    try:
        if path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            return path, {str(name): int(index) for name, index in saved.items()}
        path = folder / _CONFIG_FILE
        if not path.is_file():
            return path, {}
        listed = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
        return path, {str(token["content"]): int(index) for index, token in listed.items()}
    except DAMAGED as error:
        raise WeightsError.at(
            str(path), f"not a JSON object of tokens and ids ({describe_reason(error)})", "download the file again"
        ) from error


def _add_saved_tokens(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Add the tokens that the other files of a tokenizer state, with the ids that they state."""
    path, saved = _read_added_tokens(folder)
    known = tokenizer.get_vocab()
    in_order = sorted((item for item in saved.items() if known.get(item[0]) != item[1]), key=lambda item: item[1])
    from tokenizers import AddedToken

    for name, index in in_order:
        plain = AddedToken(name, normalized=False, special=True)
        tokenizer.add_tokens([_image_token(name) if name in ADDED_TOKENS else plain])
        got = tokenizer.convert_tokens_to_ids(name)
        if got != index:
            raise WeightsError.at(
                str(path),
                f"the id of {name} does not fit the vocabulary (got {got}, expected {index})",
                "download the tokenizer's files again",
            )
