"""The attributes of DeepSpeed's optimizers that hold the float32 partitions."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from llavar_peft.compat import dependency_internals


@pytest.mark.slow
def test_the_optimizers_have_the_attributes() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizers = (DeepSpeedZeroOptimizer_Stage3, DeepSpeedZeroOptimizer)
    for attribute, optimizer in zip(dependency_internals._PARTITIONS, optimizers, strict=True):
        assert f"self.{attribute} = []" in inspect.getsource(optimizer.__init__)


def test_partitions_are_found_under_either_name_and_reported_missing() -> None:
    one = torch.ones(3)
    for attribute in dependency_internals._PARTITIONS:
        assert dependency_internals.fp32_partitions(SimpleNamespace(**{attribute: [one]})) == [one]
        # With offload to disk the partitions are empty tensors.
        assert dependency_internals.fp32_partitions(SimpleNamespace(**{attribute: [torch.ones(0)]})) == []
    assert dependency_internals.fp32_partitions(SimpleNamespace()) == []
