"""The private parts of PyTorch that the package uses still behave as it expects."""

from __future__ import annotations

import pytest
import torch

from llavar_peft.compat.dependency_internals import fake_tensors


def test_fake_tensors_have_no_memory_and_take_part_in_autocast_and_autograd() -> None:
    with fake_tensors():
        left = torch.empty(1 << 20, 1 << 20, requires_grad=True)  # 4 TiB
        right = torch.empty(1 << 20, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = left @ right
        assert (product.dtype, product.shape, product.device.type) == (torch.bfloat16, (1 << 20, 8), "cpu")
        assert product.requires_grad


def test_meta_tensors_do_not_replace_them() -> None:
    with pytest.raises(RuntimeError, match="autocast"):
        torch.autocast("meta", dtype=torch.bfloat16)
