"""Damage files at random, and look for tracebacks, hangs and excessive memory: ``make fuzz``.

A case is a target and a seed: ``make fuzz FUZZ_ARGS="--target adapter --seed 123"`` runs that one again, and keeps its
files and prints everything. ``--cases N`` runs the seeds from ``--first`` on.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.fuzz_workers import Case, Failure, keep_command_line, run_cases, run_valid_files
from tests.fuzz.targets import TARGETS, write_request
from tests.fuzz.valid_files import build_valid_files


def main() -> int:
    """Run the program, and return its exit status."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="Only this kind of file.")
    parser.add_argument("--seed", type=int, help="Run one case again, keep its files and print everything.")
    parser.add_argument("--first", type=int, default=0, help="The first seed.")
    parser.add_argument("--cases", type=int, default=2000, help="Number of cases in all.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Number of processes.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Start no case after this time.")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-valid-"))
    try:
        build_valid_files(folder)
        write_request(folder)
        os.chdir("/")
        keep_command_line()
        names = options.target or sorted(TARGETS)
        for wrong in run_valid_files(names, folder):
            print(f"the undamaged files fail: {wrong}")  # noqa: T201
        cases = choose_cases(names, options.first, options.cases)
        if options.seed is not None:
            cases = [(name, options.seed) for name in names]
        failures = report(cases, folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failures else 0


def choose_cases(names: list[str], first: int, count: int) -> list[Case]:
    """Return cases in random order; a target with twice the weight gets twice the seeds."""
    total = sum(TARGETS[name].weight for name in names)
    cases = [(name, seed) for name in names for seed in range(first, first + -(-count * TARGETS[name].weight // total))]
    random.Random(first).shuffle(cases)
    return cases[:count]


def report(cases: list[Case], files: Path, options: argparse.Namespace) -> list[Failure]:
    """Run cases, and print what fails and how many there were of each target."""
    started, failures, done = time.monotonic(), list[Failure](), Counter[str]()
    stop, keep = started + options.seconds, options.seed is not None
    for one in run_cases(cases, files, workers=options.workers, keep=keep, stop=stop):
        done[one.target if isinstance(one, Failure) else one[0]] += 1
        if isinstance(one, Failure):
            failures.append(one)
            print(one.details if keep else one, flush=True)  # noqa: T201
    found = Counter((one.target, one.kind) for one in failures)
    for name, count in sorted(done.items()):
        kinds = ", ".join(f"{number} {kind}" for (target, kind), number in sorted(found.items()) if target == name)
        print(f"{name:<12} {count:>7} cases  {kinds or 'no failure'}")  # noqa: T201
    print(f"{sum(done.values())} cases, {len(failures)} failures, {time.monotonic() - started:.0f} s")  # noqa: T201
    return failures


if __name__ == "__main__":
    sys.exit(main())
