"""What we rely on in accelerate beyond its public interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

SCRIPT = """
from accelerate import Accelerator
from llavar_peft.compat.dependency_internals import enable_fsdp_on_cpu

accelerator = Accelerator(cpu=True)
before = accelerator.distributed_type.value
enable_fsdp_on_cpu(accelerator)
if accelerator.is_main_process:
    after = Accelerator()
    print("types", before, accelerator.distributed_type.value, accelerator.is_fsdp2, after.distributed_type.value)
"""


@pytest.mark.slow
def test_fsdp_on_cpu_has_to_be_enabled_and_can_be(tmp_path: Path) -> None:
    """If the first value is no longer MULTI_CPU, accelerate shards by itself and the entry can be removed."""
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        env={**os.environ, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "types MULTI_CPU FSDP True FSDP" in done.stdout, done.stderr[-2000:]


def test_gradient_exchange_can_be_switched_off() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.sync_gradients
    accelerator.sync_gradients = False
    assert not accelerator.gradient_state.sync_gradients
    accelerator.sync_gradients = True
