"""The language model of a GGUF file: its settings, its vocabulary and its tensors by llama.cpp's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from llavar_peft.constants import SYSTEM_PROMPT
from llavar_peft.data.text_encoder import text_encoder
from llavar_peft.errors import ConfigError
from llavar_peft.models.gguf_chat_template import gguf_chat_template, writes_bos
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.weights.gguf.gguf_folder import GgufFile
from llavar_peft.weights.gguf.gguf_tensors import (
    OTHER_LAYOUT,
    GgufTensor,
    OutType,
    describe_file,
    import_gguf,
    matrix_type,
)
from llavar_peft.weights.gguf.gguf_vocabulary import GgufVocabulary, read_vocabulary
from llavar_peft.weights.gguf.score_tokenizer import ScoreTokenizer
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_table import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

_ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture for each kind of language model."""
_TURNED: Final = {".self_attn.q_proj.": "num_attention_heads", ".self_attn.k_proj.": "num_key_value_heads"}
"""Tensors of LLaMA's whose rows llama.cpp expects in another order, and the field with their number of heads."""
_LLAMA_3: Final = "llama3"
_ROPE_FACTORS: Final = "rope_freqs.weight"
_PROBES: Final = (
    "The sign says STOP.", "  two  spaces   and more    ", "Total: $1,234.50\n\nVAT 19 %", "ﬁne ½ Ａ e\u0301 ①",
    "日本語 \U0001f600\U0001f469\u200d\U0001f467 \u0378\t\n\r", "a <0x41> ▁x",
    "=" * 37 + " " * 21 + "aaaaaaaaaaa",
)  # fmt: skip
_SHOWN: Final = 8
"""Tokens of a text in a message."""


def language_model_file(
    parts: ModelParts, tensors: Mapping[str, TensorEntry | Tensor], name: str, outtype: OutType
) -> GgufFile:
    """Return the file of a language model.

    Args:
        parts: The model.
        tensors: Where each tensor is stored, by our names.
        name: The model's name in the file.
        outtype: How matrices are stored.

    Raises:
        ConfigError: llama.cpp does not have this language model or its tokenizer.
    """
    gguf, text = import_gguf(), parts.config.text_config
    architecture = _check_language_model(parts)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], text.num_hidden_layers)
    found = []
    for ours, source in tensors.items():
        if ours.startswith(("model.language_model.", "lm_head.")):
            stored = names.get_name(tensor_names.to_released(ours), try_suffixes=(".weight", ".bias"))
            if stored is None:
                raise ConfigError.at("to", f"llama.cpp's {architecture} has no tensor for {ours}", OTHER_LAYOUT)
            heads = next((getattr(text, field) for part, field in _TURNED.items() if part in ours), 0)
            kind = matrix_type(tuple(source.shape), outtype)
            found.append(GgufTensor(stored, source, kind, heads if architecture == "llama" else 0))
    if text.rope_parameters["rope_type"] == _LLAMA_3:
        found.append(GgufTensor(_ROPE_FACTORS, _rope_factors(text), "F32"))
    rows = int(tensors[tensor_names.find_embeddings(tensors)].shape[0])
    vocabulary = read_vocabulary(json.loads(parts.tokenizer.backend_tokenizer.to_str()), rows, parts.source)
    _check_pieces(vocabulary, parts)

    def describe(writer: Any) -> None:
        describe_file(writer, "MODEL", name, outtype)
        _describe_settings(writer, text, rows)
        _describe_vocabulary(writer, vocabulary, parts)

    return GgufFile(f"{name}-{outtype}.gguf", architecture, describe, found)


def _check_language_model(parts: ModelParts) -> str:
    """Return llama.cpp's architecture of a language model, whose computation it can do."""
    text = parts.config.text_config
    kind, rope = text.model_type, getattr(text, "rope_parameters", None) or {}
    what = None
    if kind not in _ARCHITECTURES:
        what = f"the language model is not written as GGUF (got {kind!r}, expected {', '.join(_ARCHITECTURES)})"
    elif text.hidden_act != "silu":
        what = f"llama.cpp's {_ARCHITECTURES[kind]} has the activation silu (got {text.hidden_act!r})"
    elif rope.get("rope_type") not in ("default", "linear", _LLAMA_3):
        what = f"this scaling of RoPE is not written as GGUF (got {rope.get('rope_type')!r})"
    elif tensor_names.HEAD_BIAS in parts.tensors:
        what = "the language model's head has a bias, which is not written as GGUF"
    if what is not None:
        raise ConfigError.at("to", what, OTHER_LAYOUT)
    return _ARCHITECTURES[kind]


def _describe_settings(writer: Any, text: Any, rows: int) -> None:
    gguf, head = import_gguf(), _head_size(text)
    writer.add_vocab_size(rows)
    # llama.cpp attends to everything in the context: within the window, that is the same.
    windows = [text.max_position_embeddings, _window(text) or text.max_position_embeddings]
    writer.add_context_length(min(windows))
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    if text.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(text.rope_parameters["factor"])


def _window(text: Any) -> int | None:
    """Return how many tokens each token sees; None for all."""
    if text.model_type == "llama" or getattr(text, "use_sliding_window", True) is False:
        return None
    window = getattr(text, "sliding_window", None)
    return None if window is None else int(window)


def _head_size(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _rope_factors(text: Any) -> Tensor:
    """Return by what LLaMA 3 divides each frequency of RoPE."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[_LLAMA_3](text, torch.device("cpu"))
    positions = torch.arange(0, _head_size(text), 2, dtype=torch.float32) / _head_size(text)
    factors: Tensor = 1.0 / text.rope_parameters["rope_theta"] ** positions / scaled
    return factors


def _describe_vocabulary(writer: Any, vocabulary: GgufVocabulary, parts: ModelParts) -> None:
    processor, tokenizer = parts.processor(), parts.tokenizer
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(True)
    else:
        writer.add_token_merges(vocabulary.merges)
    for role in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    others = sorted(processor.stop_token_ids - {tokenizer.eos_token_id})
    if others:
        writer.add_eot_token_id(others[0])
    writer.add_add_bos_token(writes_bos(processor))
    writer.add_add_eos_token(False)
    writer.add_chat_template(gguf_chat_template(processor))


def _check_pieces(vocabulary: GgufVocabulary, parts: ModelParts) -> None:
    """Reject a tokenizer whose merges no scores can express: the model would read other tokens than in training.

    Names of special tokens in a text do not count: the programs of llama.cpp take them for the tokens in any case.
    """
    if vocabulary.model != "llama":
        return
    scored, encoder = ScoreTokenizer(vocabulary.tokens, vocabulary.scores), text_encoder(parts.processor())
    for text in (*_PROBES, SYSTEM_PROMPT):
        expected, got = encoder.encode(text)[0], scored.encode(text)
        if got != expected:
            what = (
                f"llama.cpp would split text into other tokens than the tokenizer: {text[:40]!r} into "
                f"{[vocabulary.tokens[index] for index in got][:_SHOWN]} (expected "
                f"{[vocabulary.tokens[index] for index in expected][:_SHOWN]})"
            )
            raise ConfigError.at(parts.source, what, OTHER_LAYOUT)
