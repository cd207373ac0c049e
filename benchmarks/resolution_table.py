"""The tables of ``resolution.py``."""

from __future__ import annotations

from typing import Any

from rounds import describe_run, figure

MIB = 2**20
BUSY = 0.5
"""A load average before the run, of other processes, from which on the machine was not idle."""
LEGEND = (
    "All are multiples of the first line: of CPU time the median (least–most) of the rounds, one step each in turn; of"
    " memory the peak of resident memory over that after the imports, with the weights, measured in two steps of other"
    " processes. Prefill: the keys and values of a prompt, with the vision tower. Training: a step of LoRA of rank 16"
    " with one record, all layers recompute; cross-attention is trained in full beside the adapters. Each image fills"
    " its grid. The measured model is small, so that attention between tokens has a larger share of its work than in a"
    " 7B: the operations in the table of estimates are those of real sizes."
)


def resolution_table(report: dict[str, Any]) -> str:
    """Format a report as Markdown."""
    busy = " The machine was not idle: other processes ran." if report["load_before"][0] > BUSY else ""
    lines = [
        describe_run(report) + busy,
        "",
        f"* model: {report['model']}; {report['text']} tokens of text",
        "",
        "| Resolution | Image tokens | Prefill: time | memory | Training step: time | memory |",
        "|---|---|---|---|---|---|",
        *(_measured(report, name) for name in report["image_tokens"]),
        "",
        LEGEND,
    ]
    return "\n".join(lines) + "\n"


def _measured(report: dict[str, Any], name: str) -> str:
    columns = [f"{report['image_tokens'][name]:,}"]
    for kind in ("prefill", "train"):
        found, memory = report[kind], report[kind]["memory"][name]
        columns += [figure(found["time"][name]), f"{memory['ratio']:.2f} ({memory['bytes'] / MIB:,.0f} MiB)"]
    return f"| {name} | {' | '.join(columns)} |"
