"""Tiny language models and vision towers of many kinds, with random weights, as their libraries save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

_CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen 3 does: without thinking, the last answer follows an empty thought, and loses line breaks before it.
_THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' + message['content'].lstrip('\n') }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# As Llama 3 does: the messages are stripped, and the system message tells the date.
_HEADERS = (
    "{{ bos_token }}{{ '<|head|>system<|/head|>\n\nToday: ' + strftime_now('%d %b %Y') + '<|eot|>' }}"
    "{% for message in messages %}{{ '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim }}"
    "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
# As Gemma does: no system message, another name for the assistant, stripped messages.
_TURNS = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As Mistral does: the answer ends with </s>, and brackets enclose the question.
_BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
_TEMPLATES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "chatml": (_CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "thinking": (_THINKING, ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"), "<|im_end|>"),
    "headers": (_HEADERS, ("<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"), "<|eot|>"),
    "turns": (_TURNS, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>"),
    "brackets": (_BRACKETS, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>"),
}
_GROUPED = {"num_key_value_heads": 2}
_HALF_WINDOWED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
_TWO_KINDS = ["sliding_attention", "full_attention"]
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Template, spare rows of the embeddings, and what the configuration adds to that of all.
_LANGUAGE_MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("headers", 0, {**_GROUPED, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": ("brackets", 0, {**_GROUPED, "sliding_window": 16, "head_dim": 8}),
    "qwen2": ("chatml", 13, {**_GROUPED, "tie_word_embeddings": True, **_HALF_WINDOWED}),
    "qwen3": ("thinking", 13, {**_GROUPED, "head_dim": 16}),
    "gemma2": ("turns", 0, {**_GROUPED, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("turns", 0, {**_GROUPED, "head_dim": 8, "sliding_window": 16, "layer_types": _TWO_KINDS}),
    "phi3": ("chatml", 13, _GROUPED),
    "smollm3": ("chatml", 0, {**_GROUPED, "no_rope_layer_interval": 2}),
    "olmo2": ("chatml", 0, _GROUPED),
    # Scaled logits; Granite also scales embeddings, attention scores and residuals.
    "granite": (
        "chatml",
        0,
        {
            **_GROUPED,
            "logits_scaling": 6.0,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.7,
            "tie_word_embeddings": True,
        },
    ),
    "cohere2": ("chatml", 0, {**_GROUPED, "logit_scale": 0.25, "sliding_window": 16, "layer_types": _TWO_KINDS}),
}
SCALED_LOGITS = ("granite", "cohere2")
LANGUAGE_MODELS = tuple(kind for kind in _LANGUAGE_MODELS if kind not in SCALED_LOGITS)
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
_IMAGE = {"image_size": 56, "patch_size": 14}
TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip", "dinov2", "dinov2_with_registers", "dinov3_vit",
          "aimv2_vision_model")  # fmt: skip


def save_language_model(kind: str, folder: Path, *, seed: int = 1) -> Path:
    """Save a language model of some kind with its tokenizer, and return the folder."""
    template, spare, changed = _LANGUAGE_MODELS[kind]
    tokenizer = make_tokenizer(template)
    config = AutoConfig.for_model(
        kind,
        **{**_SIZES, "num_hidden_layers": 2, "max_position_embeddings": 512, **changed},
        vocab_size=len(tokenizer) + spare,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that differences show in the logits
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with one of the chat templates."""
    source, specials, eos = _TEMPLATES[template]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = "What is written on the sign? The total is 12.50 assistant user system model helpful You are a"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([words] * 20, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    untyped: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = untyped(
        tokenizer_object=backend, bos_token=specials[0], eos_token=eos, pad_token=specials[0], chat_template=source
    )
    return made


def save_tower(kind: str, folder: Path) -> Path:
    """Save a vision tower of some kind with its image processor, and return the folder."""
    sizes = {**_SIZES, **_IMAGE, "num_hidden_layers": 3}
    if kind == "siglip":  # with its text tower, as on the hub
        config = AutoConfig.for_model(kind, vision_config=sizes, text_config={**_SIZES, "num_hidden_layers": 1})
    else:
        config = AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(2)
    AutoModel.from_config(config).save_pretrained(folder)
    square = {"height": 56, "width": 56}
    if kind == "clip_vision_model":
        images: Any = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square)
    elif kind.startswith("dinov2"):  # prepared at another size than the tower was trained with
        images = BitImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42})
    else:
        images = SiglipImageProcessorPil(size=square)
    images.save_pretrained(folder)
    return folder
