"""How much faster than the original's a training step on a CPU could be, if only matrix products took time.

    python benchmarks/train_limit.py [--stages stage1 stage2 lora] [--rounds 5] [--out STEM]

The model and records are those of ``train.py``, in one thread. A profiler measures how much of the original's step, and
of ours, each by default, are matrix products and attention, forward and backward. Faster code of any other kind cannot
make these shorter, so that the original's whole step over the products of ours is the limit.

Linux only. Takes five minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rounds import describe_run, figure, ratios
from torch.profiler import ProfilerActivity, profile
from train_contenders import BATCH, LENGTHS, TUNES, Cell, contender, import_all
from train_model import SHAPES, Records, Shape
from transformers import TrainerCallback
from weights import about

CONTENDERS = ("original", "ours")
WARM_UP = 1
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_convolution", "convolution_backward")
ATTENTION = "_scaled_dot_product"


class StepProfiler(TrainerCallback):
    """Measures the CPU time of each optimizer step, and of the matrix products in it.

    Attributes:
        whole: Seconds of each step.
        products: Seconds of each step that are matrix products or attention.
    """

    def __init__(self) -> None:
        self.whole: list[float] = []
        self.products: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start to measure."""
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._profile.__enter__()
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Add the figures of the step."""
        self.whole.append(time.process_time() - self._began)
        self._profile.__exit__(None, None, None)
        self.products.append(
            sum(event.self_cpu_time_total for event in self._profile.key_averages() if is_product(event.key)) / 1e6
        )


def is_product(name: str) -> bool:
    """Return whether an operation of PyTorch multiplies matrices."""
    _, _, plain = name.rpartition("aten::")
    return plain in PRODUCTS or plain.startswith(ATTENTION)


def measure(stage: str, shape: Shape, steps: int, work: Path) -> dict[str, Any]:
    """Return the figures of both contenders for a key of ``TUNES``."""
    records = Records(LENGTHS[stage], steps * BATCH[stage], shape)
    cell: dict[str, Any] = {"stage": stage}
    for name in CONTENDERS:
        seen = StepProfiler()
        task = Cell(stage=stage, shape=shape, batch=BATCH[stage], steps=steps, folder=work / stage / name)
        contender(name, task, records, seen).train()
        cell[name] = {"whole": seen.whole[WARM_UP:], "products": seen.products[WARM_UP:]}
        gc.collect()
    cell["now"] = ratios(cell["original"]["whole"], cell["ours"]["whole"])
    cell["limit"] = ratios(cell["original"]["whole"], cell["ours"]["products"])
    return cell


def share(one: dict[str, Sequence[float]]) -> str:
    """Format the median share of products in the steps of a contender."""
    return f"{ratios(one['products'], one['whole'])[0]:.0%}"


def table(report: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        describe_run(report),
        "",
        "| | products in the original's step | in ours | times faster, profiled | limit: products alone |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {cell['stage']} | {share(cell['original'])} | {share(cell['ours'])} | {figure(cell['now'])} |"
        f" {figure(cell['limit'])} |"
        for cell in report["cells"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and print the table; with ``--out``, write it and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=TUNES, default=list(TUNES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="run in seconds to test the script")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_all()
    shape = SHAPES["tiny" if options.small else "middle"]
    command = " ".join(["python", "benchmarks/train_limit.py", *sys.argv[1:]])
    report = {"date": datetime.now(timezone.utc).date().isoformat(), "command": command, **about()}
    report.update(rounds=options.rounds, threads=1, load_before=os.getloadavg())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="limit-") as folder:
        report["cells"] = [measure(stage, shape, options.rounds + WARM_UP, Path(folder)) for stage in options.stages]
    report.update(seconds=time.perf_counter() - start, load_after=os.getloadavg())
    printed = table(report)
    sys.stdout.write(printed)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(printed)


if __name__ == "__main__":
    main()
