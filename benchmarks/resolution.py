"""Measure what each resolution costs, as ratios to the model that sees the whole image only.

    python benchmarks/resolution.py [--rounds 3] [--tiny] [--out STEM]

A prefill and a training step (LoRA of rank 16, recomputing, one record) of the same small model of random weights with
each resolution of ``resolution_work.py``, each in its own process, which make one step each in turn with one thread.
Images have the real number of tokens, 576 at the tower's size, and fill the grid. Memory is the peak of resident memory
of other processes, whose allocator returns freed memory at once.

Linux only. Takes about 10 minutes on one idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from resolution_table import resolution_table
from resolution_work import PLAIN, SETTINGS, SHAPE, TEXT, TINY, Task, image_tokens, make
from rounds import ratios
from train_contenders import import_all
from turns import Steps, take_turns
from weights import about

WARM_UP, MEMORY_STEPS = 1, 2
"""In the second step of a training the optimizer's states exist."""


def measure(kind: str, steps: int, work: Path, *, tiny: bool, lean: bool) -> dict[str, Steps]:
    """Let all settings take turns.

    Args:
        kind: ``prefill`` or ``train``.
        steps: Number of steps of each.
        work: Folder for the trainers' files.
        tiny: Whether the model is the smallest.
        lean: Whether memory is measured rather than time.
    """
    task = Task(kind, TINY if tiny else SHAPE, steps, work / f"{kind}-{lean}")

    def maker(name: str) -> Any:
        return lambda turn: make(name, task, turn)

    return take_turns({name: maker(name) for name in SETTINGS}, steps, lean=lean)


def time_ratios(done: dict[str, Steps]) -> dict[str, list[float]]:
    """Return the CPU time of each setting's step, as a multiple of the plain model's in the same round."""
    return {name: ratios(steps.cpu[WARM_UP:], done[PLAIN].cpu[WARM_UP:]) for name, steps in done.items()}


def memory_ratios(done: dict[str, Steps]) -> dict[str, dict[str, float]]:
    """Return the peak of each setting over the imports in bytes, and as a multiple of the plain model's."""
    peaks = {name: steps.peak - steps.imports for name, steps in done.items()}
    return {name: {"bytes": peak, "ratio": peak / peaks[PLAIN]} for name, peak in peaks.items()}


def main() -> None:
    """Print the tables; with ``--out``, write them and the figures of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tiny", action="store_true", help="run in seconds to test the script; the figures are meaningless"
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    # Set before any thread starts, so that the contenders can be forked.
    torch.set_num_threads(1)
    import_all()
    command = " ".join(["python", "benchmarks/resolution.py", *sys.argv[1:]])
    report: dict[str, Any] = {"date": datetime.now(timezone.utc).date().isoformat(), "command": command, **about()}
    shape = TINY if options.tiny else SHAPE
    report.update(rounds=options.rounds, threads=1, model=str(shape), text=TEXT, load_before=os.getloadavg())
    report["image_tokens"] = {name: image_tokens(name, shape) for name in SETTINGS}
    start, steps = time.perf_counter(), options.rounds + WARM_UP
    with tempfile.TemporaryDirectory(prefix="resolution-") as folder:
        for kind in ("prefill", "train"):
            done = measure(kind, steps, Path(folder), tiny=options.tiny, lean=False)
            lean = measure(kind, MEMORY_STEPS, Path(folder), tiny=options.tiny, lean=True)
            report[kind] = {
                "steps": {name: asdict(one) for name, one in done.items()},
                "time": time_ratios(done),
                "memory": memory_ratios(lean),
            }
    report.update(seconds=time.perf_counter() - start, load_after=os.getloadavg())
    printed = resolution_table(report)
    sys.stdout.write(printed)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(printed)


if __name__ == "__main__":
    main()
