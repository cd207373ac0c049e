"""Other kernels of the layers: they replace the right modules and nothing else, and compute the same.

Liger's kernels run on GPUs only (tests/gpu compares the real ones). Here their interface is a module of plain PyTorch.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from llavar_peft import Lora, ModelConfig
from llavar_peft.errors import EnvironmentFaultError, MissingDependencyError
from llavar_peft.models import build_model as building
from llavar_peft.models import layer_kernels, packed_attention
from llavar_peft.models.layer_kernels import apply_kernels
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.training.supervised_loss import supervised_loss
from tests.flash_attention import varlen_kernels
from tests.training.test_operation_counts import _model
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER


class LigerRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, hidden.shape[-1:], self.weight, self.eps)


class LigerSwiGLUMLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = self.gate_proj(hidden)
        made: Tensor = self.down_proj(gate * gate.sigmoid() * self.up_proj(hidden))
        return made


def liger_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(tensor: Tensor) -> Tensor:
        one, two = tensor.chunk(2, dim=-1)
        c, s = (table[:, None, :, : one.shape[-1]] for table in (cos, sin))
        return torch.cat([one * c - two * s, two * c + one * s], dim=-1)

    return rotate(q), rotate(k)


def liger_modules() -> dict[str, ModuleType]:
    """Return modules with the classes above in the place of liger-kernel's."""
    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    for made in (LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb):
        setattr(module, made.__name__, made)
    package.transformers = module  # type: ignore[attr-defined]
    package.__spec__ = ModuleSpec("liger_kernel", None)
    return {"liger_kernel": package, "liger_kernel.transformers": module}


def import_as_liger(patch: pytest.MonkeyPatch) -> None:
    """Let the classes above be imported as Liger's."""
    for name, module in liger_modules().items():
        patch.setitem(sys.modules, name, module)
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    import_as_liger(monkeypatch)


def _batch(lengths: tuple[int, ...] = (14, 10)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (1, 24), generator=generator)
    ids[0, 2:6] = 60
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "labels": torch.where(ids == 60, -100, ids), "lengths": lengths, "pixel_values": pixels}


def _step(
    model: LlavarForConditionalGeneration, trained: Any, lengths: tuple[int, ...] = (14, 10)
) -> tuple[float, dict[str, Tensor]]:
    enable_packing(model)
    loss, count, _ = supervised_loss(trained, _batch(lengths))
    (loss / count).backward()
    found = {name: one.grad for name, one in trained.named_parameters() if one.grad is not None}
    return float(loss.detach()) / count, found


def _pair(layers: int = 2) -> tuple[LlavarForConditionalGeneration, LlavarForConditionalGeneration]:
    torch.manual_seed(0)
    one, other = _model(layers), _model(layers)
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("adapted", [False, True])
def test_liger_replaces_norms_and_mlps_of_the_language_model(adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = _pair()
    names = {name: id(parameter) for name, parameter in other.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        apply_kernels(other, "liger")
    assert {name: id(parameter) for name, parameter in other.named_parameters()} == names
    kinds = {name: type(module) for name, module in other.named_modules()}
    norms = {name for name, kind in kinds.items() if kind is LigerRMSNorm}
    layers = "model.language_model.layers"
    expected = {f"{layers}.{n}.{norm}" for n in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")}
    assert norms == {*expected, "model.language_model.norm"}
    assert {name for name, kind in kinds.items() if kind is LigerSwiGLUMLP} == {f"{layers}.{n}.mlp" for n in (0, 1)}
    torch.manual_seed(1)
    tune = Lora(rank=4, dropout=0.0)
    models = [apply_tuning(one, tune) if adapted else one for one in (plain, other)]
    if adapted:
        models[1].load_state_dict(models[0].state_dict())
    (loss, gradients), (other_loss, others) = (
        _step(one, trained.train()) for one, trained in zip((plain, other), models, strict=True)
    )
    assert other_loss == pytest.approx(loss, abs=1e-5)
    assert set(gradients) == set(others)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-4)


def test_a_missing_package_and_a_missing_gpu_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(1)
    monkeypatch.setattr(layer_kernels, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llavar-peft\[liger\]'"):
        apply_kernels(model, "liger")
    monkeypatch.setattr(layer_kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFaultError, match="needs a GPU"):
        apply_kernels(model, "liger")
    assert all(type(layer.mlp) is modeling_llama.LlamaMLP for layer in model.get_decoder().layers)


def test_the_setting_reaches_the_model_and_the_default_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(building, "apply_kernels", lambda model, kernels: seen.append(kernels))
    config = {"language_model": str(LANGUAGE_MODEL), "vision_tower": str(VISION_TOWER), "dtype": "float32"}
    building.build_model(ModelConfig(**config))
    building.build_model(ModelConfig(**config, kernels="compile"))
    building.build_pending_model(ModelConfig(**config, kernels="compile"))
    assert seen == ["none", "compile", "compile"]
    model = _model(1)
    apply_kernels(model, "none")
    assert not any(module._compiled_call_impl for module in model.modules())
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


def compile_without_code(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let ``torch.compile`` trace without making machine code, which takes long, and return the graphs to come."""
    compiled: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=backend, **options))
    torch.compiler.reset()
    return compiled


@pytest.mark.slow
def test_compiled_layers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers share graphs, also for decoded tokens. Without the backend that makes machine code, which takes long."""
    compiled = compile_without_code(monkeypatch)
    plain, other = _pair(layers=10)
    apply_kernels(other, "compile")
    _check_steps(plain, plain.train(), other, other.train())
    # Before and after the attention of each conversation, and the last norm; fewer than layers.
    assert 2 < len(compiled) < 10
    ids = torch.arange(3, 12)[None]
    made, same = (one.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False) for one in (other, plain))
    assert torch.equal(made, same)
    assert len(compiled) < 20  # and norms and MLPs of a prompt and of a single token
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_with_the_packed_kernel_a_recomputed_layer_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_without_code(monkeypatch)
    plain, other = _pair(layers=10)
    apply_kernels(other, "compile")
    models = []
    for one in (plain, other):
        torch.manual_seed(1)
        models.append(apply_tuning(one, Lora(rank=4, dropout=0.0)).train())
        models[-1].gradient_checkpointing_enable({"use_reentrant": False})
    models[1].load_state_dict(models[0].state_dict())
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda device: True)
    monkeypatch.setattr(packed_attention, "_KERNEL_DTYPES", (torch.float32,))
    with varlen_kernels() as calls:
        _check_steps(plain, models[0], other, models[1])
    assert calls.ends
    assert len(compiled) == 2  # and the last norm
    torch.compiler.reset()


def _check_steps(plain: Any, trained: Any, other: Any, other_trained: Any) -> None:
    """Check losses and gradients of rows with one to four conversations."""
    for lengths in ((14, 10), (24,), (5, 7, 12), (6, 6, 6, 6)):
        trained.zero_grad()
        other_trained.zero_grad()
        expected, gradients = _step(plain, trained, lengths)
        loss, others = _step(other, other_trained, lengths)
        assert loss == pytest.approx(expected, abs=1e-6)
        assert set(others) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-5)
