"""The cost of opening a million records, measured in a new process that ``data.py`` starts.

    python data_records.py HOW PATH

Private memory is the increase of memory that is not shared with other processes; the file and its index are shared by
all ranks and workers.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ("the", "of", "and", "a", "sign", "reads", "poster", "red", "white", "book", "author", "store", "open", "price")
QUESTION = "<image>\nIdentify any text visible in the image provided."
READ = 50_000


def write_records(path: Path, count: int) -> None:
    """Write indented records of the length of those in ``chat_llavar.json``, 383 bytes on average."""
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
    """Return the private memory of this process that is not backed by a file, in MiB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


def measure(how: str, path: Path) -> dict[str, float]:
    """Open the records by one method, and read some of them in random order.

    Returns:
        ``open_s``; ``private_mib`` after opening; ``us_per_record`` in random order; and ``preflight_s`` of all records
        if there is an index and the folder ``images`` next to the file.
    """
    open_: Callable[[], Any]
    if how == "json.load":
        open_ = lambda: json.load(path.open(encoding="utf-8"))  # noqa: E731
    else:
        from llavar_peft.data.check_records import preflight
        from llavar_peft.data.image_roots import ImageRoots
        from llavar_peft.data.record_store import open_records

        open_ = lambda: open_records(path)  # noqa: E731
    before, start = private_mib(), time.perf_counter()
    records = open_()
    opened, memory = time.perf_counter() - start, private_mib() - before
    order = random.Random(1).choices(range(len(records)), k=READ)
    start = time.perf_counter()
    for index in order:
        records[index]
    figures = {"open_s": opened, "private_mib": memory, "us_per_record": (time.perf_counter() - start) / READ * 1e6}
    images = path.parent / "images"
    if how == "index, again" and images.is_dir():
        start = time.perf_counter()
        found = preflight(records, ImageRoots(images))
        figures["preflight_s"] = time.perf_counter() - start
        if found:
            raise SystemExit(f"preflight: {found[0][1]}")
    return figures


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))) + "\n")
