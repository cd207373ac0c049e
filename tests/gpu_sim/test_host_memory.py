"""The host memory of a node while a run starts on many ranks: at most 1.2 copies of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST = 1.2
"""Copies of the stored model per node."""
LAYERS = 8
"""Of the language model. What a rank needs beside its shards weighs more in a shorter model, so that the limit is
tighter than at full depth."""
CASES = ("8,13b,full", "8,7b,lora", "8,7b,ddp", "16,7b,stage1")
PER_NODE = 8
PLAIN = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""The allocator returns freed memory to the system."""


@pytest.mark.slow
def test_a_node_holds_no_more_than_one_copy_and_a_fifth() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fast_start", "tests.gpu_sim.host_memory", str(LAYERS), *CASES],
        cwd=Path(__file__).parents[2], env={**os.environ, **PLAIN}, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [each["case"] for each in found] == list(CASES)
    for each in found:
        # The files that the ranks read are in the memory of the node once.
        most = max(PER_NODE * each["before"], each["copy"] + PER_NODE * each["reading"])
        assert most <= MOST * each["copy"], (each, most / each["copy"])
