"""The estimate of a step's floating point operations is what PyTorch's counter counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

from llavar_peft import DataConfig, Full, Lora, ModelConfig, OptimConfig, Projector, Stage
from llavar_peft.compat.dependency_internals import fake_tensors
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.models.llavar_config import LlavarConfig, make_config
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import enable_packing, packed_arguments
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.preflight.estimate_compute import RecordLengths, flops_per_step
from llavar_peft.preflight.estimate_memory import count_parameters
from llavar_peft.preflight.estimate_views import image_cost
from llavar_peft.recipe.resolution import CrossAttention, Tiles
from llavar_peft.recipe.schema import Tune
from llavar_peft.recipe.schema_rules import tunes_tower
from llavar_peft.training.supervised_loss import supervised_loss

CPU = torch.device("cpu")
TUNES: dict[str, Tune] = {
    "projector": Projector(),
    "full": Full(),
    "lora": Lora(rank=8, dropout=0.05),
    "attention": Lora(rank=8, target="attention"),
    "adapters-alone": Lora(rank=8, dropout=0.05, train_projector=False, train_image_rows=False),
    "dora": Lora(rank=8, dropout=0.0, variant="dora"),
    "dora-dropout": Lora(rank=8, dropout=0.05, variant="dora"),
    "tower": Full(train_tower=True),
    "tower-adapters": Lora(rank=8, dropout=0.05, tower_rank=4),
}
_SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SMALL_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip


def _sdpa(query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, tokens, width = query
    return int(4 * batch * heads * tokens * key[2] * width)


def _sdpa_backward(_: Any, query: Any, key: Any, *rest: Any, **__: Any) -> int:
    return 5 * _sdpa(query, key) // 2


# The counter knows the operators of GPUs only.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


def _count(step: Callable[[], Tensor], tower_attention: int) -> float:
    """Count a step's operations, half of them for masked attention, of which the counter counts both halves."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        step().backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(number for name, number in counts.items() if "dot_product" in str(name))
    return sum(counts.values()) - (attention - tower_attention) / 2


def _tower_attention(config: LlavarConfig, images: int, extra_positions: int = 1) -> int:
    vision = config.vision_config
    used = vision.num_hidden_layers + 1 + config.vision_feature_layer
    return images * used * 4 * vision.hidden_size * (config.image_seq_length + extra_positions) ** 2


def _estimate(config: LlavarConfig, tune: Tune, recompute: bool, lengths: tuple[int, ...]) -> float:
    stage = Stage(
        name="one", data=DataConfig(records="x"), tune=tune, optim=OptimConfig(learning_rate=1e-3),
        global_batch_size=len(lengths), micro_batch_size=len(lengths), gradient_checkpointing=recompute,
    )  # fmt: skip
    count = len(lengths)
    squares = sum(length**2 for length in lengths) / count
    cost = image_cost(config, stage.max_length)
    measured = RecordLengths(count, sum(lengths) / count, max(lengths), squares, 1.0, cost.tokens, cost.views)
    return flops_per_step(config, stage, count_parameters(config, tune), measured)


def _recompute(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("tune", TUNES.values(), ids=TUNES)
def test_a_small_model(tune: Tune, recompute: bool) -> None:
    text = LlamaConfig(**_SMALL, num_hidden_layers=3)
    config = make_config(text, CLIPVisionConfig(**_SMALL_TOWER), vocab_size=203, image_token_id=200)
    _check_small(config, tune, recompute, extra_positions=1)


@pytest.mark.parametrize(
    ("kind", "tower", "extra_positions", "tune"),
    [
        ("qwen3", "siglip_vision_model", 0, Lora(rank=8, dropout=0.05)),
        ("phi3", "dinov2_with_registers", 5, Lora(rank=8)),
        ("gemma3_text", "siglip_vision_model", 0, Full()),
        ("olmo2", "dinov2", 1, Projector()),
    ],
)
def test_a_small_model_of_another_kind(kind: str, tower: str, extra_positions: int, tune: Tune) -> None:
    text = AutoConfig.for_model(kind, **_SMALL, num_hidden_layers=6, head_dim=32, sliding_window=512)
    config = make_config(
        text, AutoConfig.for_model(tower, **_SMALL_TOWER, mlp_ratio=4), vocab_size=203, image_token_id=200,
        extra_positions=extra_positions, projector_type="mlp2x_gelu",
    )  # fmt: skip
    _check_small(config, tune, recompute=True, extra_positions=extra_positions)


@pytest.mark.parametrize("pool", [1, 2])
def test_a_small_model_with_tiles(pool: Any) -> None:
    config = make_config(
        LlamaConfig(**_SMALL, num_hidden_layers=3), CLIPVisionConfig(**_SMALL_TOWER), vocab_size=203,
        image_token_id=200, projector_type="mlp2x_gelu", resolution=Tiles(grid=((1, 1), (2, 2)), pool=pool),
    )  # fmt: skip
    _check_small(config, Lora(rank=8), recompute=False, extra_positions=1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("tune", "recompute"), [(Projector(), False), (Full(), True), (Lora(rank=8), True)])
def test_a_small_model_with_cross_attention(tune: Tune, recompute: bool) -> None:
    config = make_config(
        LlamaConfig(**_SMALL, num_hidden_layers=3), CLIPVisionConfig(**_SMALL_TOWER), vocab_size=203,
        image_token_id=200, resolution=CrossAttention(grid=3),
    )  # fmt: skip
    _check_small(config, tune, recompute, extra_positions=1)


def _crossed(
    config: LlavarConfig, recompute: bool, lengths: tuple[int, ...], before: int
) -> tuple[dict[str, Any], int]:
    """Return the batch's crops and where its images start, and the operations of attending to the crops."""
    if config.cross_attention is None:
        return {}, 0
    crops = config.cross_attention.grid**2
    inputs = {"detail_values": torch.zeros(2, crops, 3, 56, 56), "image_starts": ((before,),) * len(lengths)}
    each = 4 * config.text_config.hidden_size * crops * config.image_seq_length * config.text_config.num_hidden_layers
    return inputs, round((3.5 + recompute) * sum(length - before for length in lengths) * each)


def _check_small(config: LlavarConfig, tune: Tune, recompute: bool, *, extra_positions: int) -> None:
    model = LlavarForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    trained = apply_tuning(model, tune).train()
    if recompute:
        _recompute(trained)
    enable_packing(model)
    lengths, starts = (150, 250), (0, 150)
    ids = torch.randint(3, 190, (1, sum(lengths)))
    cost = image_cost(config, 2048)
    for start in starts:
        ids[0, start + 8 : start + 8 + cost.tokens] = 200
    labels = torch.where(ids == 200, IGNORE_INDEX, ids)
    crossed, detail_attention = _crossed(config, recompute, lengths, 8)
    images = torch.zeros(2 if crossed else 2 * cost.views, 3, 56, 56)
    batch = {"input_ids": ids, "labels": labels, "lengths": lengths, "pixel_values": images, **crossed}
    if config.tiles is not None:
        side = 2 * math.isqrt(cost.projected)
        batch["image_layouts"] = [(2, 2, side, side)] * 2
    # In a tower that is trained, the gradients of the attention take 2.5 times its operations.
    passes = 3.5 + recompute if tunes_tower(tune) else 1.0
    attention = round(passes * _tower_attention(config, 2 * cost.views, extra_positions))
    counted = _count(lambda: supervised_loss(trained, batch)[0], attention + detail_attention)
    # The estimate counts tokens before the image among those that attend to its crops.
    within = 0.03 if crossed else 0.005
    assert _estimate(config, tune, recompute, lengths) == pytest.approx(counted, rel=within)


def _to_fake(root: torch.nn.Module) -> None:
    """Replace meta tensors by fake ones, which have a device, so that the kernels of that device are counted."""
    for module in root.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("tune", "recompute"),
    [(Projector(), False), (Full(), True), (Lora(rank=64), True), (Lora(rank=64, variant="dora"), False)],
    ids=["projector", "full", "lora", "dora"],
)
def test_the_shape_of_7b(tune: Tune, recompute: bool) -> None:
    """On tensors without memory; with two of its layers."""
    named = config_without_weights(ModelConfig(language_model="vicuna-7b", vision_tower="clip-vit-large-patch14-336"))
    text = LlamaConfig.from_dict({**named.text_config.to_dict(), "num_hidden_layers": 2})
    config = make_config(text, named.vision_config, vocab_size=text.vocab_size, image_token_id=named.image_token_index)
    with torch.device("meta"):
        model = LlavarForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        trained = apply_tuning(model, tune).train()
    if recompute:
        _recompute(trained)
    enable_packing(model)
    with fake_tensors():
        _to_fake(trained)
        lengths = (900, 1400)
        tokens = sum(lengths) - 2 * config.image_seq_length
        pixels = torch.empty(2, 3, 336, 336)

        def step() -> Tensor:
            # The parts of ``forward`` whose shapes do not depend on values: without the splice in the right places.
            features = torch.cat(model.model.get_image_features(pixels).pooler_output)
            words = model.get_input_embeddings()(torch.zeros(tokens, dtype=torch.int64))
            hidden = model.get_decoder()(
                inputs_embeds=torch.cat([features, words])[None],
                use_cache=False,
                **packed_arguments(lengths, model, CPU),
            ).last_hidden_state
            loss: Tensor = model.lm_head(hidden[0, :tokens].clone(), torch.zeros(tokens, dtype=torch.int64))
            return loss

        counted = _count(step, _tower_attention(config, 2))
    assert _estimate(config, tune, recompute, lengths) == pytest.approx(counted, rel=0.02)
    assert math.isfinite(counted)


def test_a_step_s_operations_grow_with_its_records() -> None:
    config = config_without_weights(ModelConfig(language_model="vicuna-7b", vision_tower="clip-vit-large-patch14-336"))
    stage = Stage(
        name="one", data=DataConfig(records="x"), tune=Lora(), optim=OptimConfig(learning_rate=1e-3),
        global_batch_size=4, micro_batch_size=2,
    )  # fmt: skip
    counts = count_parameters(config, stage.tune)
    lengths = RecordLengths(4, 900.0, 1000, 900.0**2, 1.0, 576.0, 1.0)
    one = flops_per_step(config, stage, counts, lengths)
    assert flops_per_step(config, replace(stage, global_batch_size=8), counts, lengths) == pytest.approx(2 * one)
