"""What opening a million records costs: an index over the file against ``json.load``.

    python benchmarks/records.py [--records 1000000]

Each line is measured in a process of its own. Private memory is what no other process shares, over what the process
took before; the file and its index are shared by all ranks and workers.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ("the", "of", "and", "a", "sign", "reads", "poster", "red", "white", "book", "author", "store", "open", "price")
QUESTION = "<image>\nIdentify any text visible in the image provided."
READ = 50_000


def write_records(path: Path, count: int) -> None:
    """Writes records as long as those of ``chat_llavar.json`` (383 bytes on average), indented as it is."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            answer = " ".join(draw.choices(WORDS, k=draw.randint(5, 50)))
            name = f"GCC_train_{index:09d}"
            turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": answer}]
            record = {"id": name, "image": f"{name}.jpg", "conversations": turns}
            file.write(("[\n" if index == 0 else ",\n") + json.dumps(record, indent=1))
        file.write("\n]\n")


def private_mib() -> float:
    """Private memory of this process that is not a copy of a file, in MiB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


def measure(how: str, path: Path) -> dict[str, float]:
    """Opens the records one way and reads some in random order.

    Returns:
        Seconds to open, private MiB after opening, microseconds a record, microseconds a record of ``preflight``.
    """
    open_: Callable[[], Any]
    if how == "json.load":
        open_ = lambda: json.loads(path.read_bytes())  # noqa: E731
    else:
        from llavar_peft.data.check import preflight
        from llavar_peft.data.image_roots import ImageRoots
        from llavar_peft.data.records import open_records

        open_ = lambda: open_records(path)  # noqa: E731
    before, start = private_mib(), time.perf_counter()
    records = open_()
    opened, memory = time.perf_counter() - start, private_mib() - before
    order = random.Random(1).choices(range(len(records)), k=READ)
    start = time.perf_counter()
    for index in order:
        records[index]
    figures = {"open_s": opened, "private_mib": memory, "us_per_record": (time.perf_counter() - start) / READ * 1e6}
    if how == "index, again":
        images = path.parent / "images"
        start = time.perf_counter()
        found = preflight(records, ImageRoots(images))
        figures["preflight_s"] = time.perf_counter() - start
        if found:
            raise SystemExit(f"preflight: {found[0][1]}")
    return figures


def say(text: str) -> None:
    """Writes a line to the standard output."""
    sys.stdout.write(text + "\n")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--measure", nargs=2, metavar=("HOW", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        say(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        write_records(path, options.records)
        (Path(folder) / "images").mkdir()
        for index in range(options.records):
            (Path(folder) / "images" / f"GCC_train_{index:09d}.jpg").touch()
        say(f"{options.records} records, {path.stat().st_size / 2**20:.0f} MiB\n")
        say(
            "| | open, s | private memory, MiB | us/record, random order | preflight of all, s |\n|---|---|---|---|---|"
        )
        for how in ("json.load", "index, first time", "index, again"):
            command = [sys.executable, __file__, "--measure", how, str(path)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            last = f"{found['preflight_s']:.1f}" if "preflight_s" in found else ""
            opened = f"{found['open_s']:.3f} | {found['private_mib']:.0f} | {found['us_per_record']:.1f}"
            say(f"| {how} | {opened} | {last} |")


if __name__ == "__main__":
    main()
