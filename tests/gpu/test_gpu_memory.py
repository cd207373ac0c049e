"""A training step's peak memory on a GPU is the estimate's, for a model with layers of 7B's shape."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import CLIPVisionConfig, LlamaConfig

from llavar_peft import DataConfig, Full, Lora, ModelConfig, OptimConfig, Projector, Stage
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.models.llavar_config import LlavarConfig, make_config
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.preflight.estimate_memory import estimate_memory
from llavar_peft.recipe.schema import Tune
from llavar_peft.training.supervised_loss import supervised_loss
from tests.gpu.device import DEVICE, GIB, ON_GPU, REHEARSED, device_module

pytestmark = ON_GPU
LAYERS, RECORDS, TOKENS = (1, 1, 64) if REHEARSED else (8, 4, 1024)
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_SMALL_TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "image_size": 56}


def _config() -> LlavarConfig:
    named = config_without_weights(ModelConfig(language_model="vicuna-7b", vision_tower="clip-vit-large-patch14-336"))
    sizes = _SMALL if REHEARSED else {}
    text = LlamaConfig.from_dict({**named.text_config.to_dict(), **sizes, "num_hidden_layers": LAYERS})
    vision = (
        CLIPVisionConfig.from_dict({**named.vision_config.to_dict(), **_SMALL_TOWER})
        if REHEARSED
        else named.vision_config
    )
    return make_config(text, vision, vocab_size=text.vocab_size, image_token_id=named.image_token_index)


def _peak(config: LlavarConfig, stage: Stage) -> int:
    """Return the peak of the second of two steps, when gradients and optimizer states exist."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlavarForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    trained = apply_tuning(model, stage.tune).train()
    for module in trained.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # as in a run, where autocast decides on the dtype
    if stage.gradient_checkpointing is True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trained.gradient_checkpointing_enable({"use_reentrant": False})
    enable_packing(model)
    optimizer = torch.optim.AdamW([one for one in trained.parameters() if one.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(3, 30_000, (1, RECORDS * TOKENS), device=DEVICE)
    for start in range(0, RECORDS * TOKENS, TOKENS):
        ids[0, start + 8 : start + 8 + config.image_seq_length] = config.image_token_index
    labels = torch.where(ids == config.image_token_index, IGNORE_INDEX, ids)
    side = config.vision_config.image_size
    pixels = torch.zeros(RECORDS, 3, side, side, device=DEVICE)
    batch = {"input_ids": ids, "labels": labels, "lengths": (TOKENS,) * RECORDS, "pixel_values": pixels}
    for _ in range(2):
        device_module().reset_peak_memory_stats()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss, count, _ = supervised_loss(trained, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return device_module().max_memory_allocated()


@pytest.mark.parametrize(
    ("tune", "recompute"),
    [(Projector(), False), (Lora(rank=64), False), (Lora(rank=64), True), (Full(), True)],
    ids=["projector", "lora", "lora-recomputed", "full-recomputed"],
)
def test_peak_memory_is_the_estimate_s(tune: Tune, recompute: bool) -> None:
    config = _config()
    stage = Stage(
        name="one", data=DataConfig(records="x"), tune=tune, optim=OptimConfig(learning_rate=1e-4),
        global_batch_size=RECORDS, micro_batch_size=RECORDS, precision="bf16", gradient_checkpointing=recompute,
    )  # fmt: skip
    supervised = RECORDS * (TOKENS - config.image_seq_length)
    estimated = estimate_memory(
        config, ModelConfig(checkpoint="x", dtype="bfloat16"), stage,
        tokens=RECORDS * TOKENS, supervised=supervised, gpus=1, sharded=False,
    ).peak  # fmt: skip
    if estimated * 1.2 > device_module().mem_get_info()[0]:
        pytest.skip(f"needs {estimated * 1.2 / GIB:.0f} GiB of free memory")
    measured = _peak(config, stage)
    gc.collect()
    device_module().empty_cache()
    if REHEARSED:
        return  # the simulated device does not measure its memory
    assert measured / GIB == pytest.approx(estimated / GIB, rel=0.15)
