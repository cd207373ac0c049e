"""Tiny random language models of every family that ``AutoModelForCausalLM`` opens, as they are on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tests.parts.tiny_parts import make_tokenizer

_LARGEST = 30_000_000
# Of each family, those names that its configuration has.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "shared_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "max_window_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    "sliding_window": 16,
    "qk_head_dim": 16,
    "rotary_dim": 4,
}
# What fits no family by its default, or not together with the sizes above.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "deepseek_v2": {"head_dim": 8, "num_experts_per_tok": 2, "topk_method": "greedy"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
                         "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "num_layers": 1, "zero_expert_num": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{kind: {"num_key_value_heads": 2} for kind in ("nemotron", "dots1")},
}  # fmt: skip


def make_config(kind: str) -> PretrainedConfig:
    """Return a tiny configuration.

    Raises:
        Exception: Whatever the family's configuration raises for sizes that do not fit it.
    """
    tokenizer = make_tokenizer("chatml")
    described = CONFIG_MAPPING[kind]().to_dict()
    sizes: dict[str, Any] = {name: size for name, size in _SIZES.items() if isinstance(described.get(name), int)}
    if "qk_nope_head_dim" in sizes:  # latent attention, which has as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(described.get(name), list):
            sizes[name] = (list(dict.fromkeys(described[name])) * 2)[:2]
    config: PretrainedConfig = AutoConfig.for_model(
        kind,
        **{**sizes, **_OWN.get(kind, {})},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config


def save_decoder(kind: str, folder: Path, *, seed: int = 1) -> Path:
    """Save a language model with its tokenizer, and return the folder.

    Raises:
        ValueError: It is not tiny.
        Exception: As from ``make_config``.
    """
    config = make_config(kind)
    with torch.device("meta"):
        size = sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{kind} has {size} parameters although it was to be tiny")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that differences show in the logits
            elif parameter.numel() == config.vocab_size:
                parameter.normal_()  # a bias of the head
    model.save_pretrained(folder)
    make_tokenizer("chatml").save_pretrained(folder)
    return folder
