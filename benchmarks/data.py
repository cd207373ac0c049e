"""Data: opening a million records, and conversations and images per second, compared with the original's pipeline.

    python benchmarks/data.py [--tokenizer tokenizer.model] [--rounds 5] [--small] [--out STEM]

* records: ``open_records`` and ``json.load``, each in a new process;
* text: ``encode_record`` and the slow tokenizer, called as in ``preprocess_v1``; ids and labels of all conversations
  are compared;
* images: ``prepare_image``, and ``expand2square`` with ``CLIPImageProcessor``; all pixels are compared.

Text and images are measured in CPU time of one core, in alternating rounds. Text needs LLaMA's ``tokenizer.model``,
which is not shipped: give ``--tokenizer``, or put it in ``reference/tokenizer`` of the folder ``LLAVAR_SHARED``. The
benchmark runs on Linux only, and takes about five minutes and 1 GB of disk.
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

from llavar_peft.constants import IMAGE_PATCH_TOKEN
from llavar_peft.data.conversation_template import LLAVA_V1
from llavar_peft.data.encode_record import encode_record
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer

HOW = ("json.load", "index, first time", "index, again")
MAX_LENGTH, IMAGE_TOKENS = 2048, 576


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of inputs."""

    records: int
    conversations: int
    images: int


FULL, SMALL = Sizes(1_000_000, 400, 60), Sizes(60_000, 12, 6)


@dataclass
class Settings:
    """The attributes of a processor that ``encode_record`` reads."""

    tokenizer: Any
    image_processor: Any = None
    image_mode: str = "pad"
    inference_image_mode: str = "pad"
    patch_size: int = 14
    use_im_start_end: bool = True
    sep_image_conv_front: bool = False
    num_image_tokens: int = IMAGE_TOKENS
    tile_geometry: None = None
    detail_grid: None = None
    image_token: str = IMAGE_PATCH_TOKEN
    conversation_template: Any = LLAVA_V1


def records(work: Path, count: int, rounds: int) -> dict[str, Any]:
    """Open a file of records by each method, in rounds.

    Args:
        work: A folder for temporary files.
        count: Number of records.
        rounds: Number of rounds.

    Returns:
        The file's ``bytes`` and, by method, the spread of each figure of ``data_records.measure``.
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
    """Measure two functions on the same inputs, in alternating order.

    Returns:
        The spread of the CPU time per input, ``ours_ms`` and ``theirs_ms``, and of the rounds' ``ratio``.
    """
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    ways = (("theirs", theirs), ("ours", ours))
    for _, way in ways:
        way(inputs[0])  # warm-up
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
    """Measure the conversion of conversations to ids and labels.

    Args:
        model: A ``tokenizer.model``.
        count: Number of conversations.
        rounds: Number of rounds.

    Returns:
        The result of ``alternate``, the ``tokens`` of all conversations, and the number that ``differ``.
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
    """Measure the conversion of image files to pixels.

    Args:
        work: A folder for temporary files.
        count: Number of images.
        rounds: Number of rounds.

    Returns:
        The result of ``alternate``, the ``bytes`` of all images, and the number that ``differ``.
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
    """Print the tables; with ``--out``, write them and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("LLAVAR_SHARED", "")
    given = Path(shared) / "reference/tokenizer/tokenizer.model" if shared else None
    parser.add_argument("--tokenizer", type=Path, default=given, help="LLaMA's tokenizer.model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a test run of seconds, whose times are meaningless")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    sizes = SMALL if options.small else FULL
    command = " ".join(["python", "benchmarks/data.py", *sys.argv[1:]])
    report = {"date": datetime.now(timezone.utc).date().isoformat(), "command": command, **about()}
    report.update(rounds=options.rounds, load_before=os.getloadavg())
    with tempfile.TemporaryDirectory(prefix="data-") as folder:
        work = Path(folder)
        has_tokenizer = options.tokenizer is not None and options.tokenizer.is_file()
        report["text"] = text(options.tokenizer, sizes.conversations, options.rounds) if has_tokenizer else None
        report["images"] = images(work / "jpegs", sizes.images, options.rounds)
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
