"""Measure time and memory of deltas and merges, against the same in memory and against reading and writing alone.

    python benchmarks/weights.py [--size full] [--rounds 3] [--tasks make apply merge] [--dry-run-13b] [--out STEM]

Contenders, each in a separate process, one after another, round by round:

* ours: ``make_delta``, ``apply_delta``, ``merge_adapter``; as released: a delta without fingerprints, whose base is
  checked by statistics; without comparison: a merge that does not compare the logits before and after, which is what
  peft does;
* in memory: the original's algorithm, with both models in memory;
* peft: ``from_pretrained``, ``PeftModel.from_pretrained``, ``merge_and_unload``, ``save_pretrained``;
* loop: ours without the arithmetic: the same readers, writers, checksums and syncs;
* copy: the same bytes read and written by plain system calls, one sync at the end.

Before each, all caches are written to disk, and the pages of all inputs are dropped from the cache
(``posix_fadvise``). Linux only. Needs about 14 GB of disk at full size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from weights_table import run_table

HERE = Path(__file__).resolve().parent
# Not imported from weights_contenders: a child's peak is at least what its parent had resident when it forked.
CONTENDERS = {
    "make": ("ours", "in memory", "loop", "copy"),
    "apply": ("ours", "in memory", "ours, as released", "loop", "copy"),
    "merge": ("ours", "peft", "ours, without comparison", "loop", "copy"),
}
"""The first two of each task have the same output."""
GOALS = (
    ("make", "ours", "in memory", "memory", 20.0),
    ("apply", "ours", "in memory", "memory", 20.0),
    ("merge", "ours", "peft", "memory", 4.0),
    ("make", "ours", "loop", "time", 1.1),
    ("apply", "ours", "loop", "time", 1.1),
    ("apply", "ours, as released", "loop", "time", 1.2),
    ("apply", "ours, as released", "loop", "cpu", 1.2),
    ("merge", "ours", "peft", "cpu", 0.8),
    ("merge", "ours", "loop", "cpu", 1.3),
    ("merge", "ours", "loop", "time", 1.3),
    ("merge", "ours", "peft", "speed", 1.7),
    ("merge", "ours, without comparison", "peft", "cpu", 0.8),
    ("merge", "ours, without comparison", "loop", "time", 1.1),
)
"""Task, contender, peer, quantity and ratio to reach: the minimum of the peer's memory or time over ours, or the
maximum of our time or CPU time over the peer's."""
_FIGURES = {"memory": ("over_imports", "peak"), "cpu": ("cpu", "process_cpu")}
"""The figures of a quantity, for the work alone and for whole processes; of time ``clock`` and ``process``."""
POLL = 0.02


def run(script: str, *arguments: str | Path) -> Any:
    """Run a script of this folder in a separate process, and return the JSON that it printed."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(task: str, name: str, work: Path) -> dict[str, float]:
    """Measure one contender, on inputs that are not in the cache.

    Returns:
        ``clock``, ``cpu``, ``asked``, ``read``, ``written``, ``peak``, ``over_imports`` and ``process_cpu`` as measured
        by the process;
        ``process``: seconds from start to exit; ``on_disk``: seconds of work until everything is on disk; ``private``:
        sampled peak of memory that is mapped from no file; ``load`` of the machine before.
    """
    drop_pages(work / "inputs")
    before, out = os.getloadavg()[0], out_of(task, name, work)
    command = [str(HERE / "weights_contenders.py"), task, name, *map(str, (work / "inputs", out, work / "tiny"))]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        private = Sampler(child.pid)
        printed, errors = child.communicate()
        process = time.perf_counter() - start
        private.stop()
    if child.returncode:
        raise SystemExit(f"{task} {name}: {errors[-3000:]}")
    figures: dict[str, float] = json.loads(printed.splitlines()[-1])
    start = time.perf_counter()
    for path in files(out):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    synced = time.perf_counter() - start
    found = {"process": process, "on_disk": figures["clock"] + synced, "private": private.peak, "load": before}
    return {**figures, **found}


def out_of(task: str, name: str, work: Path) -> Path:
    """Return the folder that a contender writes."""
    return work / f"{task}, {name}"


class Sampler(threading.Thread):
    """Samples a process's private memory: ``RssAnon``, which is mapped from no file."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self._status, self._done = Path(f"/proc/{pid}/status"), threading.Event()
        self.start()

    def run(self) -> None:
        """Sample every ``POLL`` seconds until stopped."""
        while not self._done.wait(POLL):
            try:
                text = self._status.read_text()
            except OSError:
                return
            if "RssAnon:" in text:
                self.peak = max(self.peak, int(text.split("RssAnon:")[1].split()[0]) * 1024.0)

    def stop(self) -> None:
        """Stop sampling."""
        self._done.set()
        self.join()


def files(folder: Path) -> Iterator[Path]:
    """Return all files under a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def drop_pages(folder: Path) -> None:
    """Write all caches to disk, and remove a folder's files from the page cache."""
    os.sync()
    for path in files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_round(work: Path, tasks: Sequence[str]) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, Any]]:
    """Measure every contender of every task once, and compare the output of ours with that of its peer."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    checks = {}
    for task in tasks:
        contenders, found[task] = CONTENDERS[task], {}
        for name in contenders:
            found[task][name] = measure(task, name, work)
            if name not in contenders[:2]:
                shutil.rmtree(out_of(task, name, work))
        outs = [out_of(task, name, work) for name in contenders[:2]]
        checks[task] = run("weights_check.py", *outs, *([work / "inputs/checkpoint"] if task == "merge" else []))
        for out in outs:
            shutil.rmtree(out)
    return found, checks


def medians(rounds: list[Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return median, minimum and maximum of every figure, by task and contender."""
    return {
        task: {
            name: {
                key: [pick(one[task][name][key] for one in rounds) for pick in (statistics.median, min, max)]
                for key in figures
            }
            for name, figures in contenders.items()
        }
        for task, contenders in rounds[0].items()
    }


def ratios(rounds: list[Any]) -> list[dict[str, Any]]:
    """Return each goal with the median of the rounds' ratios, for the work alone and for whole processes."""
    found = []
    for task, name, peer, what, goal in (goal for goal in GOALS if goal[0] in rounds[0]):
        keys = _FIGURES.get(what, ("clock", "process"))
        pairs = [[(one[task][peer][key], one[task][name][key]) for one in rounds] for key in keys]
        got = [
            statistics.median(ours / other if what in ("time", "cpu") else other / ours for other, ours in pair)
            for pair in pairs
        ]
        found.append(
            {"task": task, "ours": name, "peer": peer, "what": what, "goal": goal, "work": got[0], "process": got[1]}
        )
    return found


def about() -> dict[str, Any]:
    """Describe the machine and the packages, without names."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "safetensors", "llavar-peft")}
    machine = {"cores": os.cpu_count(), "memory": memory, "system": platform.system(), "kind": platform.machine()}
    threads = os.environ.get("OMP_NUM_THREADS", "torch's default")
    return {"machine": machine, "python": platform.python_version(), "packages": packages, "threads": threads}


def main() -> None:
    """Print the tables, and with ``--out`` write them and the figures of every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=("tiny", "small", "full"), default="full", help="0.3 MB, 0.3 or 2.3 GB a side"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--dry-run-13b", action="store_true", help="apply a delta of 26 GB, in sparse files")
    parser.add_argument("--work", type=Path, help="existing folder on the disk to measure; default: a temporary one")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    command = " ".join(["python", "benchmarks/weights.py", *sys.argv[1:]])
    report = {"date": datetime.now(timezone.utc).date().isoformat(), "command": command, **about()}
    report["load_before"] = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="weights-", dir=options.work) as folder:
        work = Path(folder)
        run("weights_inputs.py", work / "tiny", "tiny")
        report["inputs"] = run("weights_inputs.py", work / "inputs", options.size)
        both = [one_round(work, options.tasks) for _ in range(options.rounds)]
        if options.dry_run_13b:
            shutil.rmtree(work / "inputs")  # the dry run needs the space on the disk
            report["thirteen_b"] = run("weights_dry_run.py", work, work / "tiny", "13b")
    rounds = [found for found, _ in both]
    report.update(load_after=os.getloadavg(), checks=[checks for _, checks in both], rounds=rounds)
    report.update(summary=medians(rounds), goals=ratios(rounds))
    text = run_table(report)
    sys.stdout.write(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
    if not all(check["equal"] for checks in report["checks"] for check in checks.values()):
        raise SystemExit("the contenders' outputs differ")


if __name__ == "__main__":
    main()
