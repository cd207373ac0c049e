"""Write the inputs of ``weights.py``: a LLaMA, a LLaVAR, its delta, a checkpoint of ours and an adapter.

The shapes are those of LLaMA; the values are random fp16 numbers with a realistic spread.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE

if TYPE_CHECKING:
    from torch import Generator, Tensor

SHARDS = 3
MODELS = ("base", "target", "delta", "released", "checkpoint", "adapter")
"""``released`` is the delta without fingerprints, like LLaVAR's; its base is checked by statistics."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a model.

    Attributes:
        hidden: Hidden size.
        inner: Width of the MLP.
        layers: Number of layers.
        words: Size of the LLaMA's vocabulary; the LLaVAR has three more tokens.
        vision: Width of the vision features.
        rank: Rank of the adapter.
    """

    hidden: int
    inner: int
    layers: int
    words: int
    vision: int
    rank: int


SHAPES = {
    "tiny": Shape(64, 172, 2, 500, 32, 8),
    "small": Shape(1024, 2752, 8, 32000, 64, 64),
    "full": Shape(2048, 5504, 20, 32000, 64, 64),
    "13b": Shape(5120, 13824, 40, 32000, 1024, 64),
}


def tensor_shapes(shape: Shape, *, llavar: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its released name, in the order of the files."""
    wide, rows = shape.hidden, shape.words + (3 if llavar else 0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, wide)}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        shapes.update({f"{at}.self_attn.{name}_proj.weight": (wide, wide) for name in "qkvo"})
        shapes[f"{at}.self_attn.rotary_emb.inv_freq"] = (64,)
        shapes.update({f"{at}.mlp.{name}_proj.weight": (shape.inner, wide) for name in ("gate", "up")})
        shapes[f"{at}.mlp.down_proj.weight"] = (wide, shape.inner)
        shapes.update({f"{at}.{name}_layernorm.weight": (wide,) for name in ("input", "post_attention")})
    shapes["model.norm.weight"] = (wide,)
    if llavar:
        shapes["model.mm_projector.weight"] = (wide, shape.vision)
        shapes["model.mm_projector.bias"] = (wide,)
    shapes["lm_head.weight"] = (rows, wide)
    return shapes


def dtype_of(name: str) -> str:
    """Return torch's name of a tensor's dtype in a released file."""
    return "float32" if name.endswith("inv_freq") else "float16"


def flat_config(shape: Shape, *, llavar: bool) -> dict[str, Any]:
    """Return ``config.json`` in the released layout."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": max(2, shape.hidden // 128),
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
        "torch_dtype": "float16", "vocab_size": shape.words,
    }  # fmt: skip
    if not llavar:
        return config
    return {
        **config, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "vocab_size": shape.words + 3,
        "mm_hidden_size": shape.vision, "mm_use_im_start_end": True, "mm_vision_select_layer": -2,
        "use_mm_proj": True, "mm_vision_tower": "clip", "sep_image_conv_front": False,
    }  # fmt: skip


def write_inputs(folder: Path, size: str) -> dict[str, Any]:
    """Write all inputs.

    Args:
        folder: Folder in which each of ``MODELS`` gets a folder.
        size: A key of ``SHAPES``.

    Returns:
        The shape, and the size of each in bytes.
    """
    import torch

    from llavar_peft import make_delta

    shape = SHAPES[size]
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(shape, llavar=False)
    base = ((name, _draw(name, sizes, generator)) for name, sizes in shapes.items())
    _write_released(folder / "base", base, shapes, flat_config(shape, llavar=False))
    shapes = tensor_shapes(shape, llavar=True)
    _write_released(
        folder / "target", _trained(folder / "base", shapes, generator), shapes, flat_config(shape, llavar=True)
    )
    make_delta(folder / "base", folder / "target", folder / "delta")
    _link_released(folder / "released", folder / "delta")
    _write_checkpoint(folder / "checkpoint", folder / "target", shape, generator)
    _write_adapter(folder / "adapter", folder / "checkpoint", shape, generator)
    return {"shape": asdict(shape), "bytes": {name: _size(folder / name) for name in MODELS}}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _draw(name: str, sizes: tuple[int, ...], generator: Generator) -> Tensor:
    import torch

    if name.endswith("inv_freq"):
        return 10000.0 ** -(torch.arange(sizes[0]) / sizes[0])
    around = 1.0 if name.endswith("norm.weight") else 0.0
    return (torch.randn(sizes, generator=generator) * 0.02 + around).half()


def _trained(base: Path, shapes: Mapping[str, tuple[int, ...]], generator: Generator) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the base after some training, and those that LLaVA adds."""
    import torch

    from llavar_peft.weights.io.tensor_blocks import open_weights

    old = open_weights(base)
    for name, sizes in shapes.items():
        if name.endswith("inv_freq"):
            yield name, old[name].clone()
            continue
        new = torch.randn(sizes, generator=generator) * (0.002 if name in old else 0.02)
        if name in old:
            new[: len(old[name])] += old[name]
        yield name, new.half()


def _write_released(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> None:
    """Write a folder as transformers 4.28 did: ``.bin`` shards by ``torch.save``, and an index."""
    import torch

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    each = sum(map(math.prod, shapes.values())) // SHARDS + 1
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    elements = 0
    for name, tensor in tensors:
        file = f"pytorch_model-{elements // each + 1:05d}-of-{SHARDS:05d}.bin"
        if shard and file not in where.values():
            torch.save(shard, folder / where[next(iter(shard))])
            shard = {}
        shard[name], where[name] = tensor, file
        elements += tensor.numel()
    torch.save(shard, folder / where[next(iter(shard))])
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _link_released(folder: Path, delta: Path) -> None:
    folder.mkdir()
    for path in delta.iterdir():
        if path.name != FINGERPRINT_FILE:
            os.link(path, folder / path.name)


def _write_checkpoint(folder: Path, target: Path, shape: Shape, generator: Generator) -> None:
    """Write the target in the layout of this package and ``transformers``, with a small tower."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, LlamaConfig

    from llavar_peft.models.build_model import expected_shapes
    from llavar_peft.models.llavar_config import make_config, read_llama_config
    from llavar_peft.weights.io import tensor_names
    from llavar_peft.weights.io.tensor_blocks import open_weights
    from llavar_peft.weights.io.tensor_table import SAFE_SINGLE

    text: LlamaConfig = read_llama_config(flat_config(shape, llavar=True), Path("config.json"))
    tower = CLIPVisionConfig(
        hidden_size=shape.vision, intermediate_size=2 * shape.vision, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = make_config(text, tower, vocab_size=shape.words + 3, image_token_id=shape.words)
    config.dtype = "float16"
    released = open_weights(target)
    tensors = {
        name: released[old] if (old := tensor_names.to_released(name)) is not None else _draw(name, sizes, generator)
        for name, sizes in expected_shapes(config).items()
    }
    folder.mkdir()
    save_file(tensors, folder / SAFE_SINGLE, metadata={"format": "pt"})
    config.save_pretrained(folder)


def _write_adapter(folder: Path, checkpoint: Path, shape: Shape, generator: Generator) -> None:
    """Write an adapter with ``peft``: LoRA on all linear layers of the language model, and the whole projector."""
    import torch

    from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
    from llavar_peft.models.tuning import apply_tuning
    from llavar_peft.recipe.schema import Lora

    model = LlavarForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float16)
    wrapped = apply_tuning(model, Lora(rank=shape.rank, alpha=2 * shape.rank, dropout=0.0))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.002
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(write_inputs(Path(sys.argv[1]), sys.argv[2])) + "\n")
