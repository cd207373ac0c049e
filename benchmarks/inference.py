"""Inference: batches, second turns, 4 bits, a cold start and the server, compared with the original's code.

    python benchmarks/inference.py [--model DIR] [--size small] [--questions 64] [--tokens 32] [--rounds 3]
        [--tasks questions turns storage start server] [--dtype bfloat16] [--clients 32] [--seconds 120] [--out STEM]

* questions: a file of questions, one at a time as in the original, and in batches by ``llavar-peft generate``;
* turns: the second turn of a conversation, with the cache of the first turn and with everything recomputed;
* storage: the language model in 4 bits and the rest in --dtype, compared with all of it in bfloat16 and in float32:
  memory, tokens per second, and the agreement of the answers;
* start: the time from the command ``llavar-peft ask`` to its first token, in a new process;
* server: ``llavar-peft serve`` with many concurrent clients, whose answers must be those of a single client.

Each task runs in its own process, on any machine, with greedy sampling. Without ``--model``, a model with random
weights is made, which is suitable for times and memory but not for the accuracy of 4 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inference_inputs import SIZES, write_questions
from inference_server import measure_server
from inference_table import run_table
from weights import about, run

BATCHES = (1, 8, 32)
DTYPES = ("bfloat16", "float32")
TASKS = ("questions", "turns", "storage", "start", "server")
_IMPORTS = "from llavar_peft.inference.chat import load_chat"


def work(task: str, model: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """Measure a task of ``inference_work.py`` in a new process."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        found: dict[str, Any] = run("inference_work.py", task, model, folder / "data", out, json.dumps(settings))
    return found


def compare_questions(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the rates by contender over the rounds, and the number of answers equal to the original's."""
    expected = rounds[0]["original"]["answers"]
    return {
        name: {
            "rate": spread([one[name]["rate"] for one in rounds]),
            "ratio": spread([one[name]["rate"] / one["original"]["rate"] for one in rounds]),
            "same": min(count_same(one[name]["answers"], expected) for one in rounds),
            "of": len(expected),
        }
        for name in rounds[0]
    }


def compare_turns(found: dict[str, Any]) -> dict[str, Any]:
    """Return the milliseconds to the first piece and to the last, with and without the cache."""
    times = {
        way: {what: spread([1e3 * one[place] for one in found[way]]) for place, what in enumerate(("first", "whole"))}
        for way in ("kept", "recomputed")
    }
    return {**times, "same": found["same"], "of": len(found["kept"])}


def compare_storage(found: dict[str, dict[str, Any]], truths: Sequence[str]) -> dict[str, Any]:
    """Return the figures of each way to store the model, and the agreement of greedy answers with those of ``nf4``."""
    keep = ("dtype", "device", "load", "weights", "peak", "rates")
    ways = {
        name: {**{key: one[key] for key in keep}, "right": count_same(one["texts"], truths)}
        for name, one in found.items()
    }
    agreement = {name: agree(one, found["nf4"]) for name, one in found.items() if name != "nf4"}
    return {"ways": ways, "agreement": agreement, "of": len(truths)}


def agree(plain: dict[str, Any], packed: dict[str, Any]) -> dict[str, float]:
    """Return the number of equal answers, and the share of tokens before the first different one."""
    shared = [
        next((place for place, (one, two) in enumerate(zip(a, b, strict=False)) if one != two), min(len(a), len(b)))
        for a, b in zip(plain["ids"], packed["ids"], strict=True)
    ]
    return {
        "same": count_same(plain["texts"], packed["texts"]),
        "tokens": sum(shared) / sum(len(ids) for ids in plain["ids"]),
    }


def measure_start(model: str, image: Path, rounds: int) -> dict[str, Any]:
    """Return the seconds from ``llavar-peft ask`` to its first token, and those of its imports alone."""
    ask = [
        "-m",
        "llavar_peft",
        "ask",
        "--model",
        model,
        "--image",
        str(image),
        "--greedy",
        "--max-new-tokens",
        "1",
        "Read.",
    ]
    times: dict[str, list[float]] = {"ask": [], "imports": []}
    for _ in range(rounds):
        for name, arguments in (("ask", ask), ("imports", ["-c", _IMPORTS])):
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            times[name].append(time.perf_counter() - began)
    return {name: spread(found) for name, found in times.items()}


def spread(figures: Sequence[float]) -> list[float]:
    """Return the median, minimum and maximum."""
    return [statistics.median(figures), min(figures), max(figures)]


def count_same(one: Sequence[str], two: Sequence[str]) -> int:
    """Return the number of equal texts."""
    return sum(a == b for a, b in zip(one, two, strict=True))


def gpu_name() -> str | None:
    """Return the GPU's name, or None. torch is not imported in this process, so that forked processes start small."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip() or None


def command_line(arguments: Sequence[str]) -> str:
    """Return the command as typed, without the folders of absolute paths."""
    words = ["python", "benchmarks/inference.py"]
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        words.append(option + equals + (Path(value).name if Path(value).is_absolute() else value))
    return " ".join(words)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all tasks that the options select."""
    model, asked = options.model, write_questions(folder / "data", options.questions)
    if model is None:
        model = str(folder / "model")
        run("inference_inputs.py", model, options.size)
    found: dict[str, Any] = {}
    if "questions" in options.tasks:
        settings = {"tokens": options.tokens, "sizes": BATCHES}
        rounds = [work("questions", model, folder, **settings) for _ in range(options.rounds)]
        found["questions"] = compare_questions(rounds)
    if "turns" in options.tasks:
        conversations = min(options.questions, 8 * options.rounds)
        found["turns"] = compare_turns(work("turns", model, folder, tokens=options.tokens, conversations=conversations))
    if "storage" in options.tasks:
        contenders = {**{name: (name, None) for name in DTYPES}, "nf4": (options.dtype, "nf4")}
        ways = {
            name: work("storage", model, folder, tokens=options.tokens, dtype=dtype, quantize=quantize)
            for name, (dtype, quantize) in contenders.items()
        }
        found["storage"] = compare_storage(ways, [one["answer"] for one in asked])
    if "start" in options.tasks:
        found["start"] = measure_start(model, folder / "data/images" / asked[0]["image"], options.rounds)
    if "server" in options.tasks:
        found["server"] = measure_server(
            model, folder / "data", asked, clients=options.clients, seconds=options.seconds, tokens=options.tokens
        )
    return found


def main() -> None:
    """Print the tables; with ``--out``, write them and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; default: a model of --size with random weights")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="largest number of tokens in an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the weights that are not in 4 bits",
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0, help="time that the clients run, in seconds")
    parser.add_argument("--work", type=Path, help="an existing folder for temporary files; default: the system's")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    report = {"date": datetime.now(timezone.utc).date().isoformat(), "command": command_line(sys.argv[1:]), **about()}
    report["packages"]["bitsandbytes"] = version("bitsandbytes")
    report["machine"]["gpu"] = gpu_name()
    report["model"] = Path(options.model).name if options.model else f"{options.size}, random weights"
    report["load_before"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="inference-", dir=options.work) as folder:
        report.update(measure(options, Path(folder)))
    report["load_after"] = os.getloadavg()[0]
    text = run_table(report)
    sys.stdout.write(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
    server = report.get("server", {})
    if server.get("wrong") or server.get("failed"):
        raise SystemExit("the server gave wrong answers or errors")


if __name__ == "__main__":
    main()
