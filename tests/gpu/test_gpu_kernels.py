"""Liger's kernels and compiled layers on a GPU give the plain layers' losses and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llama import modeling_llama

from llavar_peft import Full, Lora
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.models.layer_kernels import apply_kernels
from llavar_peft.models.llavar_config import make_config
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Kernels, Tune
from llavar_peft.training.supervised_loss import supervised_loss
from tests.gpu.device import DEVICE, ON_GPU, REHEARSED

pytestmark = ON_GPU
IMAGE = 1000


def _model() -> LlavarForConditionalGeneration:
    config = make_config(
        LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=1 if REHEARSED else 4, num_attention_heads=8,
            vocab_size=IMAGE, pad_token_id=0,
        ),
        CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, image_size=56,
            patch_size=14,
        ),
        vocab_size=IMAGE + 3, image_token_id=IMAGE,
    )  # fmt: skip
    torch.manual_seed(0)
    model: LlavarForConditionalGeneration = LlavarForConditionalGeneration._from_config(
        config, attn_implementation="sdpa", dtype=torch.bfloat16
    )
    return model.to(DEVICE)


def _steps(kernels: Kernels, tune: Tune) -> list[tuple[float, dict[str, Tensor]]]:
    model = _model()
    apply_kernels(model, kernels)
    torch.manual_seed(1)
    trained = apply_tuning(model, tune).train()
    enable_packing(model)
    found = []
    for seed, lengths in enumerate(((100, 60), (40, 90, 70))):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 900, (1, sum(lengths)), generator=generator)
        ids[0, 2:18] = IMAGE
        pixels = torch.randn(1, 3, 56, 56, generator=generator).to(DEVICE)
        labels = torch.where(ids == IMAGE, IGNORE_INDEX, ids).to(DEVICE)
        batch = {"input_ids": ids.to(DEVICE), "labels": labels, "lengths": lengths, "pixel_values": pixels}
        trained.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss, count, _ = supervised_loss(trained, batch)
        (loss / count).backward()
        gradients = {name: one.grad.float() for name, one in trained.named_parameters() if one.grad is not None}
        found.append((float(loss.detach()) / count, gradients))
    return found


@pytest.mark.parametrize(
    ("kernels", "tune"),
    [("liger", Full()), ("liger", Lora(rank=8, dropout=0.0)), ("compile", Lora(rank=8, dropout=0.0))],
    ids=["liger-full", "liger-lora", "compile-lora"],
)
def test_losses_and_gradients_are_the_plain_ones(kernels: Kernels, tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"liger": "liger_kernel", "compile": "triton"}[kernels])
    # Restored at the end: other tests of this process must not use Liger's rotation.
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    expected = _steps("none", tune)
    for (loss, gradients), (other_loss, others) in zip(expected, _steps(kernels, tune), strict=True):
        assert other_loss == pytest.approx(loss, rel=0.01)
        assert set(others) == set(gradients)
        for name, gradient in gradients.items():
            difference = float((others[name] - gradient).norm())
            assert difference <= 0.1 * float(gradient.norm()) + 1e-4, name
