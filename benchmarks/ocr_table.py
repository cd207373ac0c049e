"""The table of ``ocr.py``."""

from __future__ import annotations

from typing import Any

from rounds import figure, ratio

GOAL = 2.0
"""Times that a page took before, at least."""
LABELS = {
    "ours": "the builder",
    "as before": "the builder, with denormal numbers and short lines padded",
    "RapidOCR": "RapidOCR's defaults, in one thread",
}


def table(report: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    machine = report["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    lines = [
        (
            f"{report['date']}, `{report['command']}`: {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB,"
            f" {machine['system']} {machine['kind']}, Python {report['python']}, {packages}; 1 thread; load average"
            f" {report['load_before'][0]:.1f} before, {report['load_after'][0]:.1f} after; {report['rounds']} rounds,"
            f" median (least–most); {report['pages']} pages of each kind; {report['seconds'] / 60:.1f} minutes in all."
        ),
        "",
        "| pages | read by | CPU s a page | times the builder's | words found |",
        "|---|---|---|---|---|",
    ]
    for kind, contenders in report["kinds"].items():
        for name, one in contenders.items():
            times = "1" if name == "ours" else ratio(one["ratio"])
            lines.append(
                f"| {kind} | {LABELS[name]} | {figure(one['seconds'])} | {times} | {100 * one['recall']:.1f} % |"
            )
    goals = ", ".join(
        f"{kind} {'met' if found['as before']['ratio'][0] >= GOAL else 'missed'}"
        for kind, found in report["kinds"].items()
    )
    return "\n".join([*lines, "", f"Goal, at least {GOAL:g} times faster than before: {goals}."]) + "\n"
