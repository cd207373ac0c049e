"""Data: opening a million records, conversations and images per second, against the original's pipeline.

    python benchmarks/data.py [--tokenizer tokenizer.model] [--rounds 5] [--small] [--out STEM]

* records: ``open_records`` against ``json.load``, each in a process of its own;
* text: ``encode_record`` against the slow tokenizer called as ``preprocess_v1`` calls it; ids and labels of every
  conversation are compared;
* images: ``prepare_image`` against ``expand2square`` and ``CLIPImageProcessor``; every pixel is compared.

Text and images are measured in CPU time of one core, in alternating rounds. LLaMA's ``tokenizer.model`` is not
shipped; without one (``--tokenizer``, or ``reference/tokenizer`` of the folder that ``LLAVAR_SHARED`` names) text is
left out. Linux only; about five minutes and 1 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from data_inputs import conversations, write_images
from data_records import write_records
from data_table import GOALS, table
from rounds import ratios, spread
from weights import about, run

from llavar_peft.data.encode_record import encode_record
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer

HOW = ("json.load", "index, first time", "index, again")
MAX_LENGTH, IMAGE_TOKENS = 2048, 576


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    records: int
    conversations: int
    images: int


FULL, SMALL = Sizes(1_000_000, 400, 60), Sizes(60_000, 12, 6)


@dataclass
class Settings:
    """What ``encode_record`` has to know of a processor."""

    tokenizer: Any
    image_processor: Any = None
    image_mode: str = "pad"
    inference_image_mode: str = "pad"
    patch_size: int = 14
    use_im_start_end: bool = True
    sep_image_conv_front: bool = False
    num_image_tokens: int = IMAGE_TOKENS


def records(work: Path, count: int, rounds: int) -> dict[str, Any]:
    """Open a file of records in each way, round by round.

    Args:
        work: A folder to write in.
        count: Number of records.
        rounds: How often.

    Returns:
        The file's ``bytes`` and, by way, the spread of each figure of ``data_records.measure``.
    """
    path = work / "records.json"
    write_records(path, count)
    index = path.with_name(path.name + ".index")
    found: dict[str, list[dict[str, float]]] = {how: [] for how in HOW}
    for number in range(rounds):
        index.unlink(missing_ok=True)
        if number == rounds - 1:
            (work / "images").mkdir()
            for record in range(count):
                (work / "images" / f"GCC_train_{record:09d}.jpg").touch()
        for how in HOW:
            found[how].append(run("data_records.py", how, path))
    return {
        "bytes": path.stat().st_size,
        "records": count,
        "found": {
            how: {key: spread([one[key] for one in ones if key in one]) for key in ones[-1]}
            for how, ones in found.items()
        },
    }


def alternate(
    ours: Callable[[Any], Any], theirs: Callable[[Any], Any], inputs: Sequence[Any], rounds: int
) -> dict[str, Any]:
    """Times two ways on the same inputs.

    Args:
        ours: Takes one input.
        theirs: The same.
        inputs: All of them.
        rounds: How often each goes through them.

    Returns:
        The spread of ``ours_ms`` and ``theirs_ms`` of CPU time for one input, and of the rounds' ``ratio``.
    """
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    ways = (("theirs", theirs), ("ours", ours))
    for _, way in ways:
        way(inputs[0])  # what is made once is made before
    for number in range(rounds):
        for name, way in ways if number % 2 else reversed(ways):
            start = time.process_time()
            for one in inputs:
                way(one)
            times[name].append((time.process_time() - start) / len(inputs) * 1e3)
    return {
        "inputs": len(inputs),
        "ours_ms": spread(times["ours"]),
        "theirs_ms": spread(times["theirs"]),
        "ratio": ratios(times["theirs"], times["ours"]),
    }


def text(model: Path, count: int, rounds: int) -> dict[str, Any]:
    """Conversations to ids and labels.

    Args:
        model: A ``tokenizer.model``.
        count: Number of conversations.
        rounds: How often.

    Returns:
        What ``alternate`` gives, ``tokens`` of all conversations and how many of them ``differ``.
    """
    from data_original import SlowTokenizer, preprocess

    slow = SlowTokenizer(model, MAX_LENGTH)
    tokenizer = load_tokenizer(model.parent)
    add_image_tokens(tokenizer)
    settings: Any = Settings(tokenizer)
    given = conversations(count, seed=0)
    differ = tokens = 0
    for record in given:
        example = encode_record(record, settings, MAX_LENGTH)
        original = preprocess(record["conversations"], slow, IMAGE_TOKENS)
        tokens += len(example.input_ids)
        differ += not (example.input_ids.equal(original["input_ids"]) and example.labels.equal(original["labels"]))
    timed = alternate(
        lambda record: encode_record(record, settings, MAX_LENGTH),
        lambda record: preprocess(record["conversations"], slow, IMAGE_TOKENS),
        given,
        rounds,
    )
    return {**timed, "tokens": tokens, "differ": differ}


def images(work: Path, count: int, rounds: int) -> dict[str, Any]:
    """Files to pixels.

    Args:
        work: A folder to write in.
        count: Number of images.
        rounds: How often.

    Returns:
        What ``alternate`` gives, ``bytes`` of all images and how many of them ``differ``.
    """
    from data_original import prepare
    from transformers import CLIPImageProcessorPil

    from llavar_peft.data.image_preparation import prepare_image

    work.mkdir()
    paths = write_images(work, count, seed=0)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    differ = sum(not prepare_image(path, "pad", clip).equal(prepare(path, clip)) for path in paths)
    timed = alternate(lambda path: prepare_image(path, "pad", clip), lambda path: prepare(path, clip), paths, rounds)
    return {**timed, "bytes": sum(path.stat().st_size for path in paths), "differ": differ}


def main() -> None:
    """Print the tables, and with ``--out`` writes them and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("LLAVAR_SHARED", "")
    given = Path(shared) / "reference/tokenizer/tokenizer.model" if shared else None
    parser.add_argument("--tokenizer", type=Path, default=given, help="LLaMA's tokenizer.model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a try-out in seconds, whose times say nothing")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    sizes = SMALL if options.small else FULL
    command = " ".join(["python", "benchmarks/data.py", *sys.argv[1:]])
    report = {"date": datetime.now(timezone.utc).date().isoformat(), "command": command, **about()}
    report.update(rounds=options.rounds, load_before=os.getloadavg())
    with tempfile.TemporaryDirectory(prefix="data-") as folder:
        work = Path(folder)
        has_tokenizer = options.tokenizer is not None and options.tokenizer.is_file()
        report["text"] = text(options.tokenizer, sizes.conversations, options.rounds) if has_tokenizer else None
        report["pictures"] = images(work / "pictures", sizes.images, options.rounds)
        report["records"] = records(work, sizes.records, options.rounds)
    report["load_after"] = os.getloadavg()
    printed = table(report)
    sys.stdout.write(printed)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(printed)
    if any(report[what] and report[what]["differ"] for what in GOALS):
        raise SystemExit("ids, labels or pixels differ from the original's")


if __name__ == "__main__":
    main()
