"""The tables of ``data.py``."""

from __future__ import annotations

from typing import Any

from lengths import about as lengths_of
from rounds import against, figure, ratio

GOALS = {"text": 20.0, "images": 1.3}
"""Smallest speed-ups over the original."""
OPEN_MS, PRIVATE_MIB = 50.0, 20e6 / 2**20
"""Limits for an indexed file."""


def table(report: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    opened = report["records"]
    machine = report["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    lines = [
        (
            f"{report['date']}, `{report['command']}`: {machine['cores']} cores, {machine['system']} {machine['kind']},"
            f" Python {report['python']}, {packages}; load average {report['load_before'][0]:.1f} before,"
            f" {report['load_after'][0]:.1f} after; {report['rounds']} rounds, median (least–most)."
        ),
        "",
        f"{opened['records']:,} records, {opened['bytes'] / 2**20:.0f} MiB:",
        "",
        "| | open, ms | private memory, MiB | us/record, random order | preflight of all, s |\n|---|---|---|---|---|",
    ]
    for how, found in opened["found"].items():
        open_ms = figure([second * 1e3 for second in found["open_s"]], 1)
        preflight = f"{found['preflight_s'][0]:.1f}" if "preflight_s" in found else ""
        private, each = figure(found["private_mib"], 1), figure(found["us_per_record"], 1)
        lines.append(f"| {how} | {open_ms} | {private} | {each} | {preflight} |")
    again = opened["found"]["index, again"]
    quick = "met" if again["open_s"][0] * 1e3 <= OPEN_MS else "missed"
    lean = "met" if again["private_mib"][0] <= PRIVATE_MIB else "missed"
    lines += ["", f"Goals, indexed: {OPEN_MS:g} ms: {quick}; 20 MB private a rank: {lean}.", ""]
    lines += ["| | original, ms | ours, ms | ours, per s and core | times faster | goal |\n|---|---|---|---|---|---|"]
    for what, goal in GOALS.items():
        found = report[what]
        if found is None:
            lines.append(f"| {what} | not measured: no tokenizer.model | | | | |")
            continue
        rate = f"{1e3 / found['ours_ms'][0]:,.0f}"
        times = f"{figure(found['theirs_ms'])} | {figure(found['ours_ms'])} | {rate} | {ratio(found['ratio'])}"
        lines.append(f"| {what} | {times} | {against(found['ratio'][0], goal)} |")
    lines.append("")
    for what in (what for what in GOALS if report[what]):
        same = "the same in all" if not report[what]["differ"] else f"DIFFERENT in {report[what]['differ']}"
        kind = "ids and labels" if what == "text" else "pixels"
        lines.append(f"* {what}: {kind} {same} of {report[what]['inputs']}.")
    lines.append(f"* Lengths, {lengths_of('stage2')} (benchmarks/lengths.py).")
    return "\n".join(lines) + "\n"
