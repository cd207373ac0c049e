"""The tables of ``weights.py``."""

from __future__ import annotations

from typing import Any

MIB = 2**20
GB = 10**9
NAMES = {
    "ours, without comparison": "ours, without comparing logits",
    "in memory": "the original's, in memory",
    "loop": "our loop without arithmetic",
    "copy": "read and write alone",
}
HEAD = (
    "| | work, s | until on disk, s | CPU, s | whole process, s | peak memory, MiB | of it over imports | private |"
    " read, GB |\n|---|---|---|---|---|---|---|---|---|"
)
LEGEND = (
    "Median of the rounds (minimum–maximum). Work: from the call to its return, after all imports; it includes the sync"
    " for ours and the loop, while for the others the sync is added in the next column. Whole process: with imports and"
    " the same work on a tiny model before. Peak memory: `ru_maxrss`, which includes pages of mapped files; private:"
    " `RssAnon`, sampled every 20 ms. Read: from the disk (`/proc/self/io`); the pages of the inputs were dropped from"
    " the cache before each run (`posix_fadvise`), and the outputs are written through the cache."
)
WHAT = {
    "memory": "memory, {peer} / {ours}",
    "time": "time, {ours} / {peer}",
    "cpu": "CPU time, {ours} / {peer}",
    "speed": "time, {peer} / {ours}",
}
AT_MOST = ("time", "cpu")


def run_table(report: dict[str, Any]) -> str:
    """Format a report as Markdown."""
    lines = [_about(report), "", HEAD]
    for task, contenders in report["summary"].items():
        lines += [_row(f"{task}: {NAMES.get(name, name)}", figures) for name, figures in contenders.items()]
    lines += ["", LEGEND, "", "| goal | expected | measured: work | measured: whole process |", "|---|---|---|---|"]
    for goal in report["goals"]:
        name = WHAT[goal["what"]].format(**goal)
        expected = f"{'at most' if goal['what'] in AT_MOST else 'at least'} {goal['goal']:g}"
        got = [f"{goal[key]:.2f}{'' if met(goal, key) else ' (missed)'}" for key in ("work", "process")]
        lines.append(f"| {goal['task']}: {name} | {expected} | {' | '.join(got)} |")
    lines += ["", *_checks(report)]
    if "thirteen_b" in report:
        lines += ["", *_thirteen_b(report["thirteen_b"])]
    return "\n".join(lines) + "\n"


def met(goal: dict[str, Any], key: str) -> bool:
    """Return whether a goal is met by the work alone (``work``), or by whole processes (``process``)."""
    return bool(goal[key] <= goal["goal"] if goal["what"] in AT_MOST else goal[key] >= goal["goal"])


def _about(report: dict[str, Any]) -> str:
    machine, inputs = report["machine"], report["inputs"]["bytes"]
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    sides = ", ".join(f"{name} {size / GB:.2f} GB" for name, size in inputs.items())
    loads = [one["load"] for found in report["rounds"] for task in found.values() for one in task.values()]
    return (
        f"{report['date']}, `{report['command']}`: {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB,"
        f" {machine['system']} {machine['kind']}, Python {report['python']}, {packages}; OMP_NUM_THREADS"
        f" {report['threads']}; load average {min(loads):.1f}–{max(loads):.1f}; {len(report['rounds'])} rounds."
        f" {sides}."
    )


def _row(name: str, figures: dict[str, Any]) -> str:
    seconds = [_spread(figures[key]) for key in ("clock", "on_disk", "cpu", "process")]
    sizes = [f"{figures[key][0] / MIB:.0f}" for key in ("peak", "over_imports", "private")]
    return f"| {name} | {' | '.join(seconds + sizes)} | {figures['read'][0] / GB:.2f} |"


def _spread(figure: list[float]) -> str:
    middle, least, most = figure
    return f"{middle:.1f} ({least:.1f}–{most:.1f})"


def _checks(report: dict[str, Any]) -> list[str]:
    lines = []
    for task, check in report["checks"][0].items():
        every = all(found[task]["equal"] for found in report["checks"])
        what = "bit-equal" if task != "merge" else "within one step of fp16"
        lines.append(
            f"{task}: {what if every else 'NOT EQUAL'} in every round ({check['tensors']} tensors, {check['elements']}"
            f" numbers, {check['differing']} differ, by {check['largest']:.1e} at most)."
        )
    return ["Outputs of ours and its peer:", *(f"* {line}" for line in lines)]


def _thirteen_b(found: dict[str, Any]) -> list[str]:
    paper = found["paper"]
    sizes = " + ".join(f"{size / GB:.1f} GB" for size in found["bytes"].values())
    parts = f" ({paper['workers']} workers, 4 blocks of {paper['block'] / MIB:.1f} MiB each)"
    return [
        f"13B, `apply_delta` on sparse files of the real size ({sizes}; {found['disk'] / MIB:.0f} MiB of disk):",
        f"{found['asked'] / GB:.1f} GB read, {found['written'] / GB:.1f} GB written in {found['clock']:.0f} s.",
        "",
        "| memory, MiB | calculated | measured |",
        "|---|---|---|",
        f"| ours, over imports{parts} | {paper['ours'] / MIB:.0f} | {found['over_imports'] / MIB:.0f} |",
        f"| ours, whole process | | {found['peak'] / MIB:.0f} |",
        f"| allowed: 1.5 GB + the largest pair of tensors | {paper['limit'] / MIB:.0f} | |",
        f"| the original's: both models | {paper['in_memory'] / MIB:.0f} | |",
    ]
