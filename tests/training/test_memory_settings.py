"""Settings that save a GPU's memory: the optimizer, autocast's cache, int8's inputs, recomputation."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llavar_peft import Full, Lora, Recipe, Trainer, build_model
from llavar_peft.compat.dependency_internals import release_int8_inputs
from llavar_peft.training import training_state
from llavar_peft.training.activation_checkpointing import Recomputation
from llavar_peft.training.stage_arguments import optimizer_name
from tests.gpu_sim import fake_training
from tests.gpu_sim.fake_training import Case


@pytest.mark.parametrize(
    ("optimizer", "precision", "device", "fused"),
    [
        ("adamw", "bf16", "cuda", True),
        ("adamw", "fp32", "cuda", True),
        ("adamw", "fp16", "cuda", False),  # accelerate would not notice skipped steps
        ("adamw", "fp32", "cpu", False),  # keeps the results of released versions
        ("adamw_8bit", "bf16", "cuda", None),
    ],
)
def test_adamw_is_fused_on_a_gpu(
    optimizer: Any, precision: str, device: str, fused: bool | None, tmp_path: Path
) -> None:
    name = optimizer_name(optimizer, precision, device=device)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    if fused is None:
        assert arguments.optim == "adamw_bnb_8bit"
        return
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    made = kind(nn.Linear(2, 2).parameters(), **options)
    assert isinstance(made, torch.optim.AdamW)
    assert bool(made.param_groups[0]["fused"]) is fused


def test_a_fused_optimizers_step_number_is_loaded_onto_the_device(tmp_path: Path) -> None:
    trained = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([trained])
    trained.grad = torch.ones(3)
    optimizer.step()
    training_state.save_shard({"one": trained}, optimizer, tmp_path / "shard", weights=False)
    on_device = nn.Parameter(torch.empty(3, device="meta"))  # stands for a device that is not the CPU
    resumed = torch.optim.AdamW([on_device])
    resumed.param_groups[0]["fused"] = True
    training_state.load_shard({"one": on_device}, resumed, tmp_path / "shard")
    assert resumed.state[on_device]["step"].device.type == "meta"
    assert resumed.param_groups[0]["fused"] is True


class _Settings(transformers.TrainerCallback):
    """Records, in forward passes that are trained, what would keep copies of weights and of adapters' inputs."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: set[tuple[bool, bool, bool]] = set()
        self.model = model
        model.get_input_embeddings().register_forward_hook(self._look)

    def _look(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            copied = any(getattr(module, "cast_input_dtype_enabled", False) for module in self.model.modules())
            self.seen.add((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), copied))


def test_training_under_autocast_keeps_no_copies(tiny_recipe: Recipe) -> None:
    """Neither of the weights, in autocast's cache, nor of what an adapter reads, in float32."""
    tune = Lora(rank=2, alpha=4.0)
    stage = dataclasses.replace(tiny_recipe.stages[1], tune=tune, precision="bf16", max_steps=1, name="only")
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, holdout=0))
    recipe = dataclasses.replace(tiny_recipe, stages=(stage,))
    model, processor = build_model(recipe.model)
    settings = _Settings(model)
    Trainer(model, processor, recipe, callbacks=[settings]).train()
    assert settings.seen == {(True, False, False)}


@pytest.mark.parametrize("function", ["MatMul8bitFp", "MatMul8bitLt"])
def test_int8_inputs_are_released(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both functions of bitsandbytes run on the CPU; ``MatMul8bitLt`` is the one for CUDA."""
    bnb = pytest.importorskip("bitsandbytes")
    from bitsandbytes.autograd import _functions

    def matmul(A: Tensor, B: Tensor, bias: Any = None, state: Any = None, **_: Any) -> Tensor:
        return getattr(_functions, function).apply(A, B, None, bias, state)

    monkeypatch.setattr(bnb, "matmul", matmul)
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(32, 16, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(16, 32), requires_grad=False, has_fp16_weights=False).to("cpu")
    start = torch.randn(4, 32)
    inner: list[weakref.ref[Tensor]] = []

    def run(hidden: Tensor) -> Tensor:
        activation = torch.relu(hidden) * 1.5
        inner.append(weakref.ref(activation))
        return layer(activation).float().sum()

    def gradient() -> tuple[Tensor, bool]:
        hidden = start.clone().requires_grad_()
        inner.clear()
        total = checkpoint(run, hidden, use_reentrant=False)
        gc.collect()
        kept = inner[0]() is not None
        total.backward()
        assert hidden.grad is not None
        return hidden.grad, kept

    expected, kept = gradient()
    assert kept  # when this fails, bitsandbytes has fixed the fault, and the workaround can be removed
    release_int8_inputs(nn.Sequential(layer))
    released, kept = gradient()
    assert not kept
    assert torch.equal(released, expected)


@pytest.mark.slow
def test_auto_leaves_room_for_what_fsdp_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight layers of 13B on eight ranks, as many keep their activations as fit."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # every rank would decide the same
    free = int(5.8 * 2**30)
    passes: list[tuple[int, int]] = []

    class _Auto(fake_training.Step):
        recomputation: Recomputation | None = None

        def forward(self) -> Tensor:
            tokens = sum(self.case.lengths)
            if self.recomputation is None:
                device = torch.device("cpu")
                self.recomputation = Recomputation(self.model, auto=True, device=device, free=lambda _: free)
            self.recomputation.plan(tokens, has_states=True)
            passes.append((self.recomputation.recomputed, self.tracker.now))
            with self.recomputation.measure(tokens):
                return super().forward()

    monkeypatch.setattr(fake_training, "Step", _Auto)
    peaks = fake_training.track_layers(Case("13b", Full(), gpus=8, accumulation=2), 8)
    (measuring, _), (recomputed, start) = passes
    assert measuring == 7
    assert 0 < recomputed < 7
    assert max(peaks.values()) - start < free
