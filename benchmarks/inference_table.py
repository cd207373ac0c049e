"""The tables of ``inference.py``."""

from __future__ import annotations

from typing import Any

MIB = 2**20


def run_table(report: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    lines = [_about(report)]
    for task, table in TABLES.items():
        if task in report:
            lines += ["", *table(report[task])]
    return "\n".join(lines) + "\n"


def _about(report: dict[str, Any]) -> str:
    machine = report["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    return (
        f"{report['date']}, `{report['command']}`: {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB,"
        f" {machine['system']} {machine['kind']}, {machine['gpu'] or 'no GPU'}, Python {report['python']}, {packages};"
        f" OMP_NUM_THREADS {report['threads']}; load average {report['load_before']:.1f} before,"
        f" {report['load_after']:.1f} after. Model: {report['model']}. Median (least–most); all answers greedy."
    )


def _questions(found: dict[str, Any]) -> list[str]:
    lines = ["| a file of questions | questions/s | times the original | answers equal to the original's |"]
    lines.append("|---|---|---|---|")
    for name, one in found.items():
        label = "the original, one at a time" if name == "original" else f"`generate`, {name}"
        lines.append(
            f"| {label} | {_spread(one['rate'], 2)} | {_spread(one['ratio'], 2)} | {one['same']} of {one['of']} |"
        )
    return lines


def _turns(found: dict[str, Any]) -> list[str]:
    labels = {"recomputed": "everything recomputed", "kept": "with the cache of the first turn"}
    lines = ["| second turn of a conversation | to the first text, ms | whole answer, ms |", "|---|---|---|"]
    lines += [
        f"| {label} | {_spread(found[way]['first'])} | {_spread(found[way]['whole'])} |"
        for way, label in labels.items()
    ]
    ratios = ", ".join(
        f"{found['recomputed'][what][0] / found['kept'][what][0]:.1f} times faster {label}"
        for what, label in (("first", "the first text"), ("whole", "the whole answer"))
    )
    return [*lines, "", f"{ratios} (of medians); the same answers in {found['same']} of {found['of']} conversations."]


def _storage(found: dict[str, Any]) -> list[str]:
    lines = [
        "| weights | model, MiB | peak over imports, MiB | load, s | tokens/s, batch 1 | batch 8 | right answers |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, one in found["ways"].items():
        rates = " | ".join(f"{one['rates'][size]:.1f}" for size in ("1", "8"))
        label = f"nf4, the rest {one['dtype']}" if name == "nf4" else name
        lines.append(
            f"| {label}, on {one['device']} | {one['weights'] / MIB:.1f} | {one['peak'] / MIB:.0f} |"
            f" {one['load']:.1f} | {rates} | {one['right']} of {found['of']} |"
        )
    agreement = "; ".join(
        f"those of {name}: {one['same']} of {found['of']}, tokens before the first difference: {one['tokens']:.1%}"
        for name, one in found["agreement"].items()
    )
    return [
        *lines,
        "",
        f"Greedy answers of nf4 equal to {agreement}. Tokens/s: decoding only, without prompts.",
    ]


def _start(found: dict[str, Any]) -> list[str]:
    return [
        "| from the command to | s |",
        "|---|---|",
        f"| the first token of `llavar-peft ask`, one token long, process ended | {_spread(found['ask'], 1)} |",
        f"| the end of its imports alone | {_spread(found['imports'], 1)} |",
    ]


def _server(found: dict[str, Any]) -> list[str]:
    one, many, memory = found["one"], found["many"], found["memory"]
    rows = [
        "| server | answers/s | seconds an answer: median | 95th of 100 | to the first text: median |",
        "|---|---|---|---|---|",
    ]
    for name, clients in (("1 client", one), (f"{found['clients']} clients", many)):
        first = f"{clients['first']:.2f}" if clients["first"] is not None else ""
        rows.append(
            f"| {name}, {clients['seconds']:.0f} s | {clients['rate']:.2f} | {clients['median']:.2f} |"
            f" {clients['late']:.2f} | {first} |"
        )
    flat = "" if abs(memory["drift"]) <= 0.05 else " (MISSED)"
    checked = (
        f"Answers of the {found['clients']} clients: {many['answers']}; {found['wrong']} unlike the single client's,"
        f" {found['failed']} failed. Memory of the server: {memory['early'] / MIB:.0f} MiB in the second quarter of the"
        f" time, {memory['late'] / MIB:.0f} in the last ({memory['drift']:+.1%}; goal: within 5 %{flat}), most"
        f" {memory['most'] / MIB:.0f}. Exit status after SIGTERM: {found['exit']}."
    )
    return [*rows, "", checked]


def _spread(figure: list[float], digits: int = 0) -> str:
    middle, least, most = (f"{number:.{digits}f}" for number in figure)
    return f"{middle} ({least}–{most})"


TABLES = {"questions": _questions, "turns": _turns, "storage": _storage, "start": _start, "server": _server}
