"""The sizes of models on the hub that are used most, so that estimates need no download.

Source: the ``config.json`` of each model, and the number of its tokenizer's tokens. Only sizes are given; they are not
enough to run a model. tests/models/test_known_models.py compares the numbers of parameters with the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_SIGLIP: Final = {"model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
                  "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16}  # fmt: skip
_SO400M: Final = {**_SIGLIP, "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                  "num_attention_heads": 16, "patch_size": 14}  # fmt: skip
_CLIP: Final = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}  # fmt: skip
_QWEN_3_4B: Final = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA: Final = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 32000}
_LLAMA_7B: Final = {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                    "num_attention_heads": 32}  # fmt: skip
_LLAMA_13B: Final = {**_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                     "num_attention_heads": 40}  # fmt: skip
_LLAVA: Final = {"model_type": "llava", "vision_config": {**_CLIP, "image_size": 336}, "image_token_index": 32000,
                 "projector_hidden_act": "gelu"}  # fmt: skip
_LLAVA_NEXT: Final = {**_LLAVA, "model_type": "llava_next"}

LLAMA_SIZES: Final[Mapping[str, Mapping[str, Any]]] = {"7b": _LLAMA_7B, "13b": _LLAMA_13B}
"""Source: LLaMA (arXiv 2302.13971), table 2, and its released params.json."""

KNOWN_MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-4B": _QWEN_3_4B,
    "Qwen/Qwen3-4B-Instruct-2507": _QWEN_3_4B,
    "meta-llama/Llama-3.2-3B-Instruct": {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "google/gemma-2-2b-it": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
        "tie_word_embeddings": True, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    "microsoft/Phi-3-mini-4k-instruct": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False, "sliding_window": 2047,
    },
    "llava-hf/llava-1.5-7b-hf": {**_LLAVA, "text_config": {**_LLAMA_7B, "vocab_size": 32064}},
    "llava-hf/llava-1.5-13b-hf": {**_LLAVA, "text_config": {**_LLAMA_13B, "vocab_size": 32064}},
    "llava-hf/llava-v1.6-vicuna-7b-hf": {**_LLAVA_NEXT, "text_config": {**_LLAMA_7B, "vocab_size": 32064}},
    "llava-hf/llava-v1.6-vicuna-13b-hf": {**_LLAVA_NEXT, "text_config": {**_LLAMA_13B, "vocab_size": 32064}},
    "openai/clip-vit-large-patch14": {**_CLIP, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_CLIP, "image_size": 336},
    "google/siglip2-base-patch16-384": {**_SIGLIP, "image_size": 384},
    "google/siglip2-so400m-patch14-384": {**_SO400M, "image_size": 384},
}  # fmt: skip
"""What the ``config.json`` of a model says about its size, by the model's name on the hub."""

TOKENS: Final[Mapping[str, int]] = {
    "Qwen/Qwen2.5-7B-Instruct": 151665,
    "Qwen/Qwen3-4B": 151669,
    "Qwen/Qwen3-4B-Instruct-2507": 151669,
    "microsoft/Phi-3-mini-4k-instruct": 32011,
}
"""Number of the tokenizer's tokens where the embeddings have more rows."""
