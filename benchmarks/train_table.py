"""The tables of ``train.py``."""

from __future__ import annotations

from typing import Any

from lengths import about as lengths_of
from rounds import against, describe_run, figure, ratio

MIB = 2**20
NAMES = {
    "original": "the original's step, recomputing (as released)",
    "original, keeping": "the original's step, keeping activations",
    "ours, recomputing": "ours, recomputing",
    "ours": "ours, by default (recomputes as memory requires)",
    "trl": "TRL's SFTTrainer on the stock LLaVA, by default (recomputing)",
    "padded": "without packing: rows padded",
    "all logits": "logits at all positions, not in chunks at supervised ones",
    "whole tower": "the tower's unused last layer computed",
    "dropout": "LoRA's dropout of 0.05 on",
    "decoding": "images decoded in the step",
    "decoding ahead": "images decoded ahead by 2 workers",
}
PAIRS = (
    ("both recomputing", "original", "ours, recomputing"),
    ("both keeping activations", "original, keeping", "ours"),
    ("each by default", "original", "ours"),
    ("TRL, both recomputing", "trl", "ours, recomputing"),
    ("TRL, each by default", "trl", "ours"),
)
SPEED_GOALS = {"stage1": 1.6, "stage2": 1.6, "lora": 2.0}
MEMORY_GOAL = 4.0
SPEED_HEAD = "| | tokens/s of CPU time | tokens/s |\n|---|---|---|"
MEMORY_HEAD = "| | peak over imports, MiB | of it over the model, MiB |\n|---|---|---|"
LEGEND = (
    "Useful tokens (without padding) per second: median (minimum–maximum) of the rounds, one step each in turn. Peak:"
    " `VmHWM` of a separate process, measured from when the model was ready; over imports it contains weights,"
    " gradients and optimizer states, over the model all but the weights. For speed, glibc's allocator keeps freed"
    " memory; for memory, it returns it to the system. Losses: the largest difference from the original's in any step."
    " Ratios are computed per round; below 1.15 there is no result. Without dropout, so that losses can be compared."
)


def train_table(report: dict[str, Any]) -> str:
    """Format a report as Markdown."""
    lines = [
        describe_run(report),
        "",
        f"* {lengths_of('stage1')}",
        f"* {lengths_of('stage2')} (also for LoRA; benchmarks/lengths.py names the sources)",
        f"* model: {report['model']}",
    ]
    lines += _summary(report)
    for cell in report["speed"]:
        lines += [
            "",
            f"### {cell['stage']}, {cell['batch']} records a step, vocabulary {cell['words']}",
            "",
            *_cell(cell),
        ]
        lines += ["", "| times faster, in CPU time | | goal |\n|---|---|---|"]
        for what, peer, name in PAIRS:
            if f"{peer} / {name}" in cell["ratios"]:
                found = cell["ratios"][f"{peer} / {name}"]
                goal = "" if "TRL" in what else against(found[0], SPEED_GOALS[cell["stage"]])
                lines.append(f"| {what} | {ratio(found)} | {goal} |")
    for cell in report["memory"]:
        lines += ["", f"### Memory: {cell['stage']}, vocabulary {cell['words']}", "", *_cell(cell, memory=True)]
        lines += ["", "| times less memory | over imports | over the model | goal |\n|---|---|---|---|"]
        lines += [_memory_row(cell, *pair) for pair in PAIRS if set(pair[1:]) <= _ran(cell)]
    if report["levers"]:
        lines += ["", "### Levers, each switched off (or on) alone; ratio of CPU time to ours by default"]
    for cell in report["levers"]:
        lines += ["", f"{cell['stage']}:", "", *_cell(cell), ""]
        lines += [f"* {NAMES[name]}: {ratio(found)}" for name, found in cell["ratios"].items()]
    lines += [f"* {line}" for line in report["simulated"]]
    return "\n".join([*lines, "", LEGEND]) + "\n"


def _summary(report: dict[str, Any]) -> list[str]:
    """Format a table of all stages: relative speed, and memory."""
    stages = [cell["stage"] for cell in report["speed"]]
    rule = "|---" * (len(stages) + 1) + "|"
    lines = ["", f"| times faster, in CPU time | {' | '.join(stages)} |", rule]
    for what, peer, name in PAIRS:
        found = [cell["ratios"].get(f"{peer} / {name}") for cell in report["speed"]]
        lines.append(f"| {what} | {' | '.join(ratio(one) if one else 'not measured' for one in found)} |")
    lines += ["", f"| peak over imports, MiB | {' | '.join(stages)} |", rule]
    for name in next(iter(report["memory"]), {"found": {}})["found"]:
        each = [cell["found"][name] for cell in report["memory"]]
        peaks = ["not measured" if one["absent"] else f"{(one['peak'] - one['imports']) / MIB:,.0f}" for one in each]
        lines.append(f"| {NAMES[name]} | {' | '.join(peaks)} |")
    return lines


def _ran(cell: dict[str, Any]) -> set[str]:
    return {name for name, found in cell["found"].items() if found["absent"] is None}


def _cell(cell: dict[str, Any], *, memory: bool = False) -> list[str]:
    lines = [MEMORY_HEAD if memory else SPEED_HEAD]
    for name, found in cell["found"].items():
        if found["absent"]:
            columns = [f"not measured: {found['absent']}", ""]
        elif memory:
            columns = [f"{(found['peak'] - found[over]) / MIB:,.0f}" for over in ("imports", "model")]
        else:
            columns = [figure(found[key], 0) for key in ("cpu_rate", "wall_rate")]
        lines.append(f"| {NAMES[name]} | {' | '.join(columns)} |")
    if cell["apart"]:
        apart = ", ".join(f"{name} {value:.1e}" for name, value in cell["apart"].items())
        lines += ["", f"Largest differences of losses from {cell['first']}: {apart}."]
    return lines


def _memory_row(cell: dict[str, Any], what: str, peer: str, name: str) -> str:
    one, other = cell["found"][peer], cell["found"][name]
    got = [(one["peak"] - one[over]) / (other["peak"] - other[over]) for over in ("imports", "model")]
    goal = "" if "TRL" in what else ", ".join(against(value, MEMORY_GOAL) for value in got)
    return f"| {what} | {got[0]:.2f} | {got[1]:.2f} | {goal} |"
