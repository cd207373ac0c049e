"""The number of CPU cores that this process may use: as Python 3.13 counts them, and within a quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
"""Files with quota and period of the two versions of control groups; a container sees its own at the root."""


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
