"""The cores that this process may use, within its affinity and the quota of its control group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llavar_peft.compat.usable_cores import spin_briefly, usable_cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "3200000 100000\n"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_affinity_and_quota_limit_the_cores(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "ascii")
    assert usable_cores(tmp_path) == cores


def test_waiting_threads_soon_sleep_unless_the_user_has_decided() -> None:
    environment = {"OMP_NUM_THREADS": "3"}
    spin_briefly(environment)
    assert environment == {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        environment = {name: "5"}
        spin_briefly(environment)
        assert environment == {name: "5"}


def test_the_command_decides_before_torch_is_imported() -> None:
    """OpenMP reads the variables when it is loaded; importing the package, as a library does, leaves them alone."""
    code = (
        "import os, sys, llavar_peft.cli as cli\nbefore = 'GOMP_SPINCOUNT' in os.environ\n"
        "cli.main = lambda: print(before, os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules) or 0\n"
        "cli.run()"
    )
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout == "False 10000 False\n"
