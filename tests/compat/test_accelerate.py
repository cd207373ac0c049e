"""What we rely on in accelerate beyond its public interface."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from llavar_peft.compat.dependency_internals import enable_fsdp_on_cpu
from tests.commands import ranks


def _enable(_: object) -> None:
    accelerator = Accelerator(cpu=True)
    before = accelerator.distributed_type.value
    enable_fsdp_on_cpu(accelerator)
    after = Accelerator().distributed_type.value
    print("types", before, accelerator.distributed_type.value, accelerator.is_fsdp2, after)  # noqa: T201


@pytest.mark.slow
def test_fsdp_on_cpu_has_to_be_enabled_and_can_be(tmp_path: Path) -> None:
    """If the first value is no longer MULTI_CPU, accelerate shards by itself and the entry can be removed."""
    done = ranks(_enable, None, tmp_path, environment={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    for one in done:
        assert "types MULTI_CPU FSDP True FSDP" in one.stdout, one.stderr[-2000:]


def test_gradient_exchange_can_be_switched_off() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.sync_gradients
    accelerator.sync_gradients = False
    assert not accelerator.gradient_state.sync_gradients
    accelerator.sync_gradients = True
