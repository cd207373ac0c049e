"""Measure training at 7B and 13B on one GPU: tokens per second, model FLOPs utilisation, peak memory.

    python benchmarks/gpu/train.py [--sizes 7b 13b] [--steps 12] [--peak-tflops 989] [--out STEM]

No result is committed yet: the script has not been run on a GPU. ``--sizes tiny`` tests it in seconds, also on a CPU.

Weights are random, created on the device in bf16; images have 336 pixels, records have the lengths of ``lengths.py``.
Each cell runs in its own process; memory is limited by ``torch.cuda.set_per_process_memory_fraction``. Utilisation
counts the necessary computation once, against the device's dense bf16 peak (989 TFLOP/s for an H200 or H100 SXM).
Quantized cells need bitsandbytes, and memory for the whole model in bf16 while they are built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEAK_TFLOPS = 989.0
CELL_SECONDS = 105.0
"""The five cells of a size end within nine minutes."""
UTILISATION = 50.0
"""The goal for LoRA in bf16, in per cent."""


def cells(size: str, steps: int) -> list[dict[str, Any]]:
    """Return the cells of one size.

    Args:
        size: A key of ``train_model.SHAPES``.
        steps: Number of optimizer steps, including two to warm up.

    Returns:
        Cells for ``train_cell.py``. ``goal_gib`` is the goal for the memory, ``cap_gib`` an enforced limit.
    """
    plain = {
        "size": size, "steps": steps, "quantize": None, "lengths": "stage2", "longest": None, "recompute": "auto",
        "cap_gib": None, "goal_gib": None,
    }  # fmt: skip
    # These ranks exceed the width of a tiny model.
    high, low = (8, 4) if size == "tiny" else (128, 64)
    qlora = {**plain, "rank": low, "quantize": "nf4"}
    limit = {"13b": 16.0, "7b": 9.0}.get(size)
    longest = 512 if size == "tiny" else 2048
    found = [
        {**plain, "name": "stage1", "rank": None, "batch": 8, "lengths": "stage1"},
        {**plain, "name": f"LoRA r={high}", "rank": high, "batch": 4},
        {**qlora, "name": f"QLoRA r={low}", "batch": 4},
        {**qlora, "name": f"QLoRA r={low}, one record of {longest} tokens", "batch": 1, "longest": longest,
         "recompute": True, "goal_gib": limit},
    ]  # fmt: skip
    if size in ("tiny", "13b"):
        found.append({**qlora, "name": f"QLoRA r={low}, batch 4 in 24 GiB", "batch": 4, "cap_gib": 24.0})
    return found


def run(cell: dict[str, Any], limit: float) -> dict[str, Any]:
    """Measure one cell.

    Args:
        cell: A cell from ``cells``.
        limit: Seconds after which the cell is given up.

    Returns:
        The result of ``train_cell.measure``, or the last line of its error under ``failed``.
    """
    paths = [str(HERE.parent), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(HERE / "train_cell.py"), json.dumps(cell)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:g} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(cell: dict[str, Any], found: dict[str, Any], peak_tflops: float) -> str:
    """Format a row of the table."""
    start = f"| {cell['size']}, {cell['name']} | {cell['batch']} | "
    if "flops_per_second" not in found:
        return f"{start}{found.get('failed') or found['out_of_memory']} | | | |"
    used = found["flops_per_second"] / (peak_tflops * 1e12) * 100
    goals = []
    if cell["name"].startswith("LoRA") and found["peak_gib"] is not None:
        goals.append(f"{UTILISATION:g} %: {'met' if used >= UTILISATION else 'missed'}")
    if cell["goal_gib"] and found["peak_gib"] is not None:
        goals.append(f"{cell['goal_gib']:g} GiB: {'met' if found['peak_gib'] < cell['goal_gib'] else 'missed'}")
    if cell["cap_gib"] and found["peak_gib"] is not None:
        goals.append(f"{cell['cap_gib']:g} GiB: met")
    memory = "not measured" if found["peak_gib"] is None else f"{found['peak_gib']:.1f} ({found['reserved_gib']:.1f})"
    return f"{start}{found['tokens_per_second']:,.0f} | {used:.1f} | {memory} | {', '.join(goals)} |"


def main() -> None:
    """Print the table; with ``--out``, write it and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "7b", "13b"), default=["7b", "13b"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS)
    parser.add_argument("--cell-seconds", type=float, default=CELL_SECONDS, help="give up a cell after this time")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps: must be at least 3, because two steps warm up")
    command = " ".join(["python", "benchmarks/gpu/train.py", *sys.argv[1:]])
    measured = [
        (cell, run(cell, options.cell_seconds)) for size in options.sizes for cell in cells(size, options.steps)
    ]
    device = next((found["device"] for _, found in measured if "device" in found), "no cell ran")
    lines = [
        f"{datetime.now(timezone.utc).date().isoformat()}, `{command}`: {device}.",
        "",
        "| | records | tokens/s | utilisation, % | peak GiB (reserved) | goal |\n|---|---|---|---|---|---|",
        *(row(cell, found, options.peak_tflops) for cell, found in measured),
    ]
    printed = "\n".join(lines) + "\n"
    sys.stdout.write(printed)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"command": command, "device": device, "cells": [{**cell, **found} for cell, found in measured]}
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(printed)
    if any("failed" in found for _, found in measured):
        raise SystemExit("some cells failed")


if __name__ == "__main__":
    main()
