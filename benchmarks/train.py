"""Compare training with the original's step and TRL: tokens per second, memory and losses, in alternating steps.

    python benchmarks/train.py [--stages stage1 stage2 lora] [--rounds 5] [--levers] [--small] [--out STEM]

Each contender is a ``transformers.Trainer`` in its own process, with the same model (``middle`` of ``train_model.py``,
random weights) and the same records (lengths of ``lengths.py``) in the same order: ours is the library's
``StageTrainer``, the original's step is in ``train_original.py``, and TRL's is ``SFTTrainer`` on the stock LLaVA class
(``pip install trl``; without it, its lines are marked as not measured). They make one step each in turn, with one
thread, after one step to warm up. Speed is measured with a vocabulary of 800, where the head has about the share of the
work that it has in a 13B model; memory is measured with 32003.

Linux only. Takes half an hour on one idle core without ``--levers``, and 45 minutes with them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rounds import ratios, spread
from train_contenders import BATCH, LENGTHS, TUNES, Cell, contender, import_all
from train_levers import decoding, even_ranks
from train_model import SHAPES, Records, Shape, with_words
from train_table import PAIRS, train_table
from turns import Steps, take_turns, useful_tokens
from weights import about

CONTENDERS = ("original", "original, keeping", "ours, recomputing", "ours", "trl")
LEVERS = ("ours", "padded", "all logits", "ours, recomputing", "whole tower")
MEMORY_WORDS, MEMORY_STEPS = 32003, 2
"""In the second step the optimizer's states exist, so that the number of recomputed layers is final."""
MEMORY_CONTENDERS = ("original", "ours, recomputing", "ours", "trl")
WARM_UP = 1


def measure(
    stage: str, names: Sequence[str], shape: Shape, *, batch: int, steps: int, work: Path, lean: bool = False
) -> dict[str, Any]:
    """Train contenders in turn.

    Args:
        stage: A key of ``TUNES``.
        names: Names of the contenders; losses are compared with those of the first.
        shape: Size of the model.
        batch: Number of records of a step.
        steps: Number of optimizer steps; the first is not counted.
        work: Folder for the trainers' files.
        lean: Whether memory is measured rather than speed.

    Returns:
        The measurements by name under ``found``, and the largest differences between losses under ``apart``.
    """
    records = Records(LENGTHS[stage], steps * batch, shape)
    cell = Cell(stage=stage, shape=shape, batch=batch, steps=steps, folder=work)

    def maker(name: str) -> Any:
        return lambda turn: contender(name, replace(cell, folder=work / name), records, turn)

    done = take_turns({name: maker(name) for name in names}, steps, lean=lean)
    return summary(stage, done, useful_tokens(records.items, batch, steps), shape=shape, batch=batch)


def summary(stage: str, done: dict[str, Steps], tokens: Sequence[int], *, shape: Shape, batch: int) -> dict[str, Any]:
    """Compute rates and differences from the measurements.

    Args:
        stage: A key of ``TUNES``.
        done: The result of ``take_turns``.
        tokens: Number of tokens of each step.
        shape: Size of the model.
        batch: Number of records of a step.

    Returns:
        Figures that can be written as JSON.
    """
    first = next(iter(done))
    found = {}
    for name, steps in done.items():
        found[name] = asdict(steps)
        for key, seconds in (("cpu_rate", steps.cpu), ("wall_rate", steps.wall)):
            rates = [count / second for count, second in zip(tokens[WARM_UP:], seconds[WARM_UP:], strict=False)]
            found[name][key] = spread(rates) if rates else None
    apart = {
        name: max(abs(one - other) for one, other in zip(steps.losses, done[first].losses, strict=True))
        for name, steps in done.items()
        if name != first and steps.absent is None
    }
    return {"stage": stage, "batch": batch, "words": shape.words, "first": first, "found": found, "apart": apart}


def with_ratios(cell: dict[str, Any]) -> dict[str, Any]:
    """Add the speed of ours relative to each peer, for the pairs of contenders that both ran."""
    found, cell["ratios"] = cell["found"], {}
    for _, peer, name in PAIRS:
        if peer in found and name in found and not (found[peer]["absent"] or found[name]["absent"]):
            cell["ratios"][f"{peer} / {name}"] = ratios(found[peer]["cpu"][WARM_UP:], found[name]["cpu"][WARM_UP:])
    return cell


def with_lever_ratios(cell: dict[str, Any], clock: str = "cpu") -> dict[str, Any]:
    """Add the time of a step with each lever relative to that of the first contender."""
    base = cell["found"][cell["first"]][clock][WARM_UP:]
    others = {name: found[clock][WARM_UP:] for name, found in cell["found"].items() if name != cell["first"]}
    return {**cell, "ratios": {name: ratios(taken, base) for name, taken in others.items()}}


def levers(stages: Sequence[str], shape: Shape, *, small: bool, steps: int, work: Path) -> list[dict[str, Any]]:
    """Measure each lever on and off."""
    found = []
    for stage in stages:
        names = (*LEVERS, *(["dropout"] if stage == "lora" else []))
        batch = 2 if small else BATCH[stage]
        cell = measure(stage, names, shape, batch=batch, steps=steps, work=work / f"levers-{stage}")
        cell["apart"].pop("dropout", None)
        found.append(with_lever_ratios(cell))
    batch = 2 if small else BATCH["stage1"]
    done, tokens = decoding(shape, batch=batch, steps=steps, work=work)
    cell = summary("stage1", done, tokens, shape=shape, batch=batch)
    return [*found, {**with_lever_ratios(cell, "wall"), "stage": "stage1 from JPEG files, ratio by the clock"}]


def main() -> None:
    """Print the tables; with ``--out``, write them and the figures of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=TUNES, default=list(TUNES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--vocabulary", type=int, default=MEMORY_WORDS, help="size of the vocabulary for the memory measurement"
    )
    parser.add_argument("--levers", action="store_true", help="also measure each lever of ours on and off")
    parser.add_argument(
        "--small", action="store_true", help="run in seconds to test the script; the figures are meaningless"
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    # Set before any thread starts, so that the contenders can be forked.
    torch.set_num_threads(1)
    import_all()
    shape = SHAPES["tiny" if options.small else "middle"]
    command = " ".join(["python", "benchmarks/train.py", *sys.argv[1:]])
    report = {"date": datetime.now(timezone.utc).date().isoformat(), "command": command, **about()}
    report.update(rounds=options.rounds, threads=1, model=str(shape), load_before=os.getloadavg(), levers=[])
    start, steps = time.perf_counter(), options.rounds + WARM_UP
    wide = with_words(shape, 200 if options.small else options.vocabulary)
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        work = Path(folder)

        def each(names: Sequence[str], of: Shape, count: int, part: str) -> list[dict[str, Any]]:
            batches = {stage: 2 if options.small else BATCH[stage] for stage in options.stages}
            return [
                measure(
                    stage, names, of, batch=batches[stage], steps=count, work=work / f"{part}-{stage}",
                    lean=part == "memory",
                )
                for stage in options.stages
            ]  # fmt: skip

        report["speed"] = [with_ratios(cell) for cell in each(CONTENDERS, shape, steps, "speed")]
        report["memory"] = each(MEMORY_CONTENDERS, wide, MEMORY_STEPS, "memory")
        if options.levers:
            report["levers"] = levers(options.stages, shape, small=options.small, steps=steps, work=work)
    report["simulated"] = [even_ranks()]
    report.update(seconds=time.perf_counter() - start, load_after=os.getloadavg())
    printed = train_table(report)
    sys.stdout.write(printed)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(printed)
    if any(value > 1e-4 for cell in report["speed"] for value in cell["apart"].values()):
        raise SystemExit("losses differ from the original's")


if __name__ == "__main__":
    main()
