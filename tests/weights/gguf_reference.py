"""What llama.cpp computes from GGUF files, in numpy: only the files are read, and nothing of this package is used.

Source: llama.cpp, src/models/llama.cpp and qwen2.cpp, and ggml's two orders of RoPE; tools/mtmd/models/llava.cpp with
the class token before the patches, as in ggml-org/llama.cpp#25844.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

Array = NDArray[np.float32]


class GgufContents:
    """The fields of a file and its tensors as float32."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {one.name: one.tensor_type.name for one in reader.tensors}
        self.tensors: dict[str, Array] = {
            one.name: np.asarray(dequantize(one.data, one.tensor_type), np.float32).reshape(one.shape[::-1])
            for one in reader.tensors
        }

    def linear(self, name: str, x: Array) -> Array:
        """Multiply with a matrix and add its bias, if it has one."""
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", np.float32(0))


def _softmax(x: Array) -> Array:
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def _attend(q_HTE: Array, k_HTE: Array, v_HTE: Array, mask: Array) -> Array:
    weights = _softmax(q_HTE @ k_HTE.transpose(0, 2, 1) / np.sqrt(np.float32(q_HTE.shape[-1])) + mask)
    return (weights @ v_HTE).transpose(1, 0, 2).reshape(q_HTE.shape[1], -1)


def language_logits(path: Path, ids: list[int], inputs: Array | None = None) -> Array:
    """Return the logits ``[T, V]`` of token ids, or of their embeddings ``inputs``."""
    file = GgufContents(path)
    kind = file.fields["general.architecture"]
    own = {name.removeprefix(f"{kind}."): value for name, value in file.fields.items()}
    heads, groups, size = own["attention.head_count"], own["attention.head_count_kv"], own["attention.key_length"]
    steps = np.arange(0, size, 2, dtype=np.float32) / size
    angles = own["rope.freq_base"] ** -steps / file.tensors.get("rope_freqs.weight", np.float32(1))
    turns = np.arange(len(ids), dtype=np.float32)[:, None] * angles / own.get("rope.scaling.factor", 1.0)
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf, np.float32), 1)

    def norm(x: Array, name: str) -> Array:
        mean = (x.astype(np.float64) ** 2).mean(-1, keepdims=True)
        return (x / np.sqrt(mean + own["attention.layer_norm_rms_epsilon"])).astype(np.float32) * file.tensors[name]

    def rotated(x_THE: Array, name: str) -> Array:
        if name in file.tensors:
            x_THE = norm(x_THE, name)
        # LLaMA's neighbors are rotated, the halves of all others.
        first, second = (x_THE[..., ::2], x_THE[..., 1::2]) if kind == "llama" else np.split(x_THE, 2, axis=-1)
        cos, sin = np.cos(turns)[:, None], np.sin(turns)[:, None]
        return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).transpose(1, 0, 2)

    x = file.tensors["token_embd.weight"][ids] if inputs is None else inputs
    for layer in range(own["block_count"]):
        at = f"blk.{layer}"
        seen = norm(x, f"{at}.attn_norm.weight")
        q, k, v = (
            file.linear(f"{at}.attn_{part}", seen).reshape(len(ids), count, size)
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = rotated(q, f"{at}.attn_q_norm.weight"), rotated(k, f"{at}.attn_k_norm.weight")
        k, v = (np.repeat(one, heads // groups, axis=0) for one in (k, v.transpose(1, 0, 2)))
        x = x + file.linear(f"{at}.attn_output", _attend(q, k, v, mask))
        seen = norm(x, f"{at}.ffn_norm.weight")
        gate = file.linear(f"{at}.ffn_gate", seen)
        x = x + file.linear(f"{at}.ffn_down", gate / (1 + np.exp(-gate)) * file.linear(f"{at}.ffn_up", seen))
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    return norm(x, "output_norm.weight") @ file.tensors[head].T


def gelu(x: Array) -> Array:
    """GELU as ggml computes it on a CPU: from -10 to 10 in float16."""
    half = np.clip(x, -10, 10).astype(np.float16).astype(np.float32)
    tanh = np.tanh(np.float32(0.7978845608) * half * (1 + np.float32(0.044715) * half * half))
    table = (0.5 * half * (1 + tanh)).astype(np.float16).astype(np.float32)
    return np.where(x <= -10, np.float32(0), np.where(x >= 10, x, table))


def image_features(path: Path, pixels_3HW: Array) -> Array:
    """Return what an image becomes in the language model, ``[P, D]``."""
    file = GgufContents(path)
    own = {name.removeprefix("clip.vision."): value for name, value in file.fields.items()}
    patch, heads, eps = own["patch_size"], own["attention.head_count"], own["attention.layer_norm_epsilon"]
    side = own["image_size"] // patch
    patches = pixels_3HW.reshape(3, side, patch, side, patch).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
    kernel = file.tensors["v.patch_embd.weight"]
    x = patches @ kernel.reshape(len(kernel), -1).T + file.tensors.get("v.patch_embd.bias", np.float32(0))
    extra = "v.class_embd" in file.tensors
    if extra:
        x = np.concatenate([file.tensors["v.class_embd"].reshape(1, -1), x])
    x = x + file.tensors["v.position_embd.weight"]

    def norm(x: Array, name: str) -> Array:
        centered = x - x.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
        return scaled * file.tensors[f"{name}.weight"] + file.tensors[f"{name}.bias"]

    def act(x: Array) -> Array:
        if not file.fields["clip.use_gelu"]:
            return x / (1 + np.exp(-1.702 * x))
        return 0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * x * (1 + np.float32(0.044715) * x * x)))

    if "v.pre_ln.weight" in file.tensors:
        x = norm(x, "v.pre_ln")
    for layer in range(max(own["feature_layer"])):
        at, seen = f"v.blk.{layer}", norm(x, f"v.blk.{layer}.ln1")
        q, k, v = (
            file.linear(f"{at}.attn_{part}", seen).reshape(len(x), heads, -1).transpose(1, 0, 2) for part in "qkv"
        )
        x = x + file.linear(f"{at}.attn_out", _attend(q, k, v, np.float32(0)))
        x = x + file.linear(f"{at}.ffn_down", act(file.linear(f"{at}.ffn_up", norm(x, f"{at}.ln2"))))
    assert "v.post_ln.weight" not in file.tensors
    return file.linear("mm.2", gelu(file.linear("mm.0", x[int(extra) :])))
