"""How long the program takes to start, over an interpreter that does the least, and how a step fares on a busy machine.

    python benchmarks/startup.py --out benchmarks/results/startup

CPU time of whole processes, one of each in turn. ``ask`` ends with the first token. The steps are those of the
quickstart's model, with its number of records, in processes whose threads spin while they wait, as PyTorch's do, sleep
at once, or spin briefly and then sleep, as the command line sets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rounds import describe_run, figure, spread
from weights import about

from llavar_peft.compat.usable_cores import spin_briefly

STEPS = Path(__file__).with_name("startup_steps.py")
BARE, IMPORTS, MODEL_IMPORTS = "python -c pass", "import torch, transformers", "and transformers' models"
_IMPORT = "import torch, transformers"
_MODELS = f"{_IMPORT}; from transformers import LlamaForCausalLM, CLIPVisionModel, ProcessorMixin"
GOALS = {"--help": 0.3, "trian": 0.3, "train --nope": 0.3, "ask": 0.3, "train typo.yaml": 0.3, "first token": 1.5}
"""Seconds over the bare interpreter; for the first token, over the imports of torch and transformers."""


def processes(folder: Path) -> dict[str, list[str]]:
    """Return the arguments of Python for each process, by name."""
    recipe = Path(__file__).parents[1] / "examples/recipes/tiny.yaml"
    typo = folder / "typo.yaml"
    typo.write_text(recipe.read_text(encoding="utf-8").replace("learning_rate", "learing_rate", 1), encoding="utf-8")
    program = ["-m", "llavar_peft"]
    asked = [
        "--model",
        str(folder / "model"),
        "--image",
        str(folder / "image.png"),
        "--max-new-tokens",
        "1",
        "--greedy",
    ]
    return {
        BARE: ["-c", "pass"],
        "--help": [*program, "--help"],
        "--version": [*program, "--version"],
        "trian": [*program, "trian"],
        "train --nope": [*program, "train", "--nope"],
        "ask": [*program, "ask"],
        "train typo.yaml": [*program, "train", str(typo)],
        IMPORTS: ["-c", _IMPORT],
        MODEL_IMPORTS: ["-c", _MODELS],
        "first token": [*program, "ask", *asked, "What does the sign say?"],
    }


def cpu_seconds(arguments: Sequence[str], status: int) -> float:
    """Return the CPU time of a Python process and its children, which has to end with a status."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, ended, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode != status:
        raise SystemExit(f"{list(arguments)}: status {process.returncode}, expected {status}")
    return usage.ru_utime + usage.ru_stime


def over(times: Mapping[str, Sequence[float]], name: str) -> list[float]:
    """Return median, minimum and maximum of a process's time over what it is compared with, in the same round."""
    peer = IMPORTS if name in ("first token", MODEL_IMPORTS) else BARE
    return spread([one - other for one, other in zip(times[name], times[peer], strict=True)])


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run processes that use a core each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def step_seconds(seconds: float, waiting: str) -> dict[str, float]:
    """Return the wall and CPU time of a training step in a process of its own, whose threads wait in a way."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    if waiting == "sleep":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    elif waiting == "spin briefly":
        spin_briefly(environment)
    done = subprocess.run(
        [sys.executable, str(STEPS), str(seconds)], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def startup_table(report: dict[str, Any]) -> str:
    """Format a report as Markdown."""
    lines = [
        describe_run(report), "", "| Process | CPU s | over | CPU s more | goal |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, times in report["times"].items():
        if name != BARE:
            found = over(report["times"], name)
            goal = GOALS.get(name)
            verdict = "" if goal is None else f"{goal:g}: {'met' if found[0] <= goal else 'missed'}"
            peer = IMPORTS if name in ("first token", MODEL_IMPORTS) else BARE
            lines.append(f"| {name} | {figure(spread(times))} | {peer} | {figure(found)} | {verdict} |")
    lines += [
        "", "Median (least–most). Every program that runs a model of transformers pays the import of these models.", "",
        "| Training step | other processes | wall s | CPU s |", "|---|---|---|---|",
    ]  # fmt: skip
    for loops, kinds in report["steps"].items():
        for kind, rounds in kinds.items():
            wall, cpu = (figure(spread([one[name] for one in rounds]), 3) for name in ("wall", "cpu"))
            lines.append(f"| threads {kind} while they wait | {loops} | {wall} | {cpu} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables; with ``--out``, write them and the figures of every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--loops", type=int, nargs="+", default=[0, 3], help="numbers of processes that use a core each"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of steps in each process")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    command = " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]])
    report: dict[str, Any] = {"date": datetime.now(timezone.utc).date().isoformat(), "command": command, **about()}
    report.update(rounds=options.rounds, load_before=os.getloadavg())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, str(STEPS), "--model", str(folder)], check=True, capture_output=True)
        named = processes(folder)
        times: dict[str, list[float]] = {one: [] for one in named}
        faulty = ("trian", "train --nope", "ask", "train typo.yaml")
        for number in range(options.rounds + 1):  # the first one reads the files
            for one, arguments in named.items():
                seconds = cpu_seconds(arguments, 2 if one in faulty else 0)
                if number:
                    times[one].append(seconds)
    report["times"], report["steps"] = times, {}
    for loops in options.loops:
        kinds: dict[str, list[dict[str, float]]] = {"spin": [], "sleep": [], "spin briefly": []}
        with busy_loops(loops):
            for _ in range(options.rounds):
                for kind, found in kinds.items():
                    found.append(step_seconds(options.seconds, kind))
        report["steps"][str(loops)] = kinds
    report.update(load_after=os.getloadavg(), seconds=time.perf_counter() - start)
    text = startup_table(report)
    print(text)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
