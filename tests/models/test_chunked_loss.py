"""The chunked loss has the value and gradients of plain cross entropy, with a fraction of its memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llavar_peft.models.chunked_loss import summed_cross_entropy


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(nn.functional.linear(hidden, weight).float(), targets, reduction="sum")


def _drawn(
    positions: int, pieces: int, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(pieces, width, generator=generator) * 0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, pieces, (positions,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 70), pieces=st.integers(1, 40), width=st.integers(1, 24), chunk=st.integers(1, 80),
    seed=st.integers(0, 2**20), factor=st.floats(1e-3, 1e3),
)  # fmt: skip
def test_value_and_gradients_equal_plain_cross_entropy(
    positions: int, pieces: int, width: int, chunk: int, seed: int, factor: float
) -> None:
    hidden, weight, targets = _drawn(positions, pieces, width, seed)
    plain = _plain(hidden, weight, targets)
    expected = torch.autograd.grad(plain * factor, (hidden, weight))
    ours = summed_cross_entropy(hidden, weight, targets, chunk=chunk)
    found = torch.autograd.grad(ours * factor, (hidden, weight))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * factor)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_trained_tensors_get_a_gradient(frozen: int) -> None:
    tensors = _drawn(9, 5, 4, 0)
    tensors[frozen].requires_grad_(False)
    summed_cross_entropy(*tensors, chunk=4).backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None


def test_half_precision_keeps_its_dtype_and_accuracy() -> None:
    """Over many chunks, a gradient summed in half precision would lose small contributions."""
    hidden, weight, targets = _drawn(4000, 7, 8, 1, torch.bfloat16)
    double = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    nn.functional.cross_entropy(double[0] @ double[1].T, targets, reduction="sum").backward()
    summed_cross_entropy(hidden, weight, targets, chunk=8).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert double[1].grad is not None
    distance = (weight.grad.double() - double[1].grad).norm() / double[1].grad.norm()
    assert distance < 0.02


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
        return made


def test_at_most_one_chunk_of_logits_exists_at_a_time() -> None:
    hidden, weight, targets = _drawn(512, 300, 16, 2)
    with _LargestTensor() as seen:
        summed_cross_entropy(hidden, weight, targets, chunk=32).backward()
    assert seen.largest <= max(32 * 300, hidden.numel(), weight.numel())
    with _LargestTensor() as seen:
        _plain(hidden, weight, targets).backward()
    assert seen.largest == 512 * 300


def test_autocast_computes_the_head_in_its_dtype() -> None:
    hidden, weight, targets = _drawn(6, 5, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = summed_cross_entropy(hidden, weight, targets), _plain(hidden, weight, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    ours.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
