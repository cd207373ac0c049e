"""What we rely on in peft, and what we replace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llavar_peft import ModelConfig, build_model
from llavar_peft.compat.dependency_internals import embed_used_rows_only
from llavar_peft.models.adapter_loading import add_adapter, apply_adapter
from llavar_peft.recipe.schema import Lora
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter

VOCABULARY, WIDTH = 50, 8


class _Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.q_proj = nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.q_proj(self.embed_tokens(ids))
        return output


class _LargeResults(TorchDispatchMode):
    """Counts the results that are as large as the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        large = isinstance(result, Tensor) and result.numel() >= VOCABULARY * WIDTH
        self.count += int(large and "embedding" not in str(func._schema.name).replace("embedding_dense", ""))
        return result


class _Copies(TorchDispatchMode):
    """Counts the results of a shape that are not views."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == self.shape:
            given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
            self.count += result.untyped_storage().data_ptr() not in given
        return result


def _peft_model(rows: list[int], dtype: torch.dtype = torch.float32) -> Any:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": rows})
    model = get_peft_model(_Model(dtype), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data = parameter.data.float() + torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    return model


def _run(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, int]:
    large = _LargeResults()
    with large:
        output = model(ids)
        output.float().square().sum().backward()
    (delta,) = (one for name, one in model.named_parameters() if "trainable_tokens_delta" in name)
    return output, delta.grad, large.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_rows_give_the_same_numbers_without_a_copy_of_the_embedding(dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 48, 49, 3, 49]])
    peft, ours = (_peft_model([48, 49], dtype) for _ in range(2))
    embed_used_rows_only(ours)
    expected, expected_gradient, copies = _run(peft, ids)
    output, gradient, none = _run(ours, ids)
    assert torch.equal(output, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0 if dtype == torch.float32 else 1e-2, atol=0)
    assert copies > 0  # otherwise peft has changed, and the entry can be removed
    assert none == 0


def test_without_the_adapter_the_embedding_is_the_base() -> None:
    ids = torch.tensor([[1, 48, 49]])
    model = _peft_model([48, 49])
    embed_used_rows_only(model)
    plain = _Model(torch.float32)
    with model.disable_adapter():
        assert torch.equal(model(ids), plain(ids))
    assert not torch.equal(model(ids), plain(ids))


def test_rows_that_are_not_consecutive_stay_with_peft() -> None:
    ids = torch.tensor([[1, 7, 49]])
    model, expected = _peft_model([7, 49]), _peft_model([7, 49])(torch.tensor([[1, 7, 49]]))
    embed_used_rows_only(model)
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("how", ["trained", "loaded", "added"])
def test_no_model_with_trained_rows_copies_its_embedding(how: str, tmp_path: Path) -> None:
    base = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
    adapters = {"rows": True, "no rows": False}
    models = {
        name: save_moved_adapter(tmp_path / name, base, Lora(rank=2, dropout=0.0, train_image_rows=rows))
        for name, rows in adapters.items()
    }
    model = models["rows"]
    if how != "trained":
        plain, _ = build_model(base)
        model = apply_adapter(plain, tmp_path / ("rows" if how == "loaded" else "no rows"))
    if how == "added":
        add_adapter(model, tmp_path / "rows", "second")
        model.set_adapter("second")
    vocabulary = model.get_base_model().config.text_config.vocab_size
    ids = torch.tensor([[1, 5, vocabulary - 1]])
    copies = _Copies(model.get_input_embeddings().weight.shape)
    with torch.no_grad(), copies:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(logits, models["rows"](input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert copies.count == 0
