"""The CPU cores that this process may use: their number, and how its threads share them with other processes."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
"""Files with quota and period of the two versions of control groups; a container sees its own at the root."""

_WAITING = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}
"""How long threads spin before they sleep, for GNU's OpenMP (in rounds of its loop) and LLVM's (in milliseconds)."""
_OTHER_WAITING = "OMP_WAIT_POLICY"


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Let PyTorch's threads sleep soon when they wait for each other, unless the user has decided how they wait.

    By default they spin for milliseconds. When other processes use the cores too, a thread that spins keeps the one
    that it waits for from running, and a training step takes many times its share of the machine. Without any spinning,
    steps of a small model wait for threads to wake up: ``benchmarks/startup.py`` compares the three. The number of
    threads stays: sums depend on it in the last bit, and a resumed run must give the same weights.

    Args:
        environment: The process's environment. OpenMP reads it when torch is imported.
    """
    if not {*_WAITING, _OTHER_WAITING} & set(environment):
        environment.update(_WAITING)


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many cores this process may use.

    Replaces ``os.cpu_count``, which counts the cores of the machine. ``os.process_cpu_count`` (Python 3.13) follows the
    process's affinity, which batch systems set, but not the quota of a control group, which containers set.

    Args:
        cgroup: Where control groups are mounted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in _QUOTAS:
        try:
            quota, period = (float(word) for name in names for word in (cgroup / name).read_text("ascii").split())
        except (OSError, ValueError):  # there is no such file, or no quota ("max")
            continue
        if quota > 0 and period > 0:
            cores = min(cores, math.ceil(quota / period))
    return max(1, cores)
