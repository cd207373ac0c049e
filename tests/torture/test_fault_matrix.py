"""Each command under each fault of the machine: it says what happened, and the next run gives the undisturbed result.

Every process is forked from one that has imported everything, so that the matrix costs seconds for each command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llavar_peft import ModelConfig, build_model, make_delta
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr.build_ocr_records import journal_path, make_ocr_record
from llavar_peft.datagen.ocr.ocr_lines import OcrLine
from llavar_peft.recipe.schema import Lora
from tests.evaluation.conftest import images as dataset
from tests.torture.faulty_process import (
    Ended,
    Fault,
    Running,
    count_events,
    full_disk,
    no_fault,
    obey_permissions,
    run,
    signal_at,
)
from tests.training.conftest import short_model, tiny_data, tiny_model, tiny_recipe
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter
from tests.weights.conftest import LLAMA, LLAVA, draw_llama, make_llava, write_folder

__all__ = ["dataset", "short_model", "tiny_data", "tiny_model", "tiny_recipe"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.torture,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes"),
]

WRONG_INPUT, ENVIRONMENT, SAVED, INTERRUPTED = 2, 3, 4, 130
REPLY = "8 9\nBecause."
TURNS = json.dumps([{"question": "What is written?", "answer": "GRAND OPENING"}] * 2)
READ = "GRAND OPENING on 5 May"
TUNE = Lora(rank=2, alpha=4.0, dropout=0.0)


@dataclass(frozen=True)
class Job:
    """A command on inputs of the workshop.

    Attributes:
        arguments: The command.
        out: Its output, which the arguments name.
        compared: Glob patterns of the files of the result, relative to the output's folder.
        saves: Whether an interruption in the middle keeps work, which the next run continues.
        middle: Size in bytes above which files fail for "a full disk in the middle".
    """

    arguments: tuple[str, ...]
    out: str
    compared: tuple[str, ...]
    saves: bool
    middle: int


JOBS = {
    "merge": Job(
        ("merge", "--base", "model", "--adapter", "adapter", "--out", "out"), "out", ("out/*",), True, 1_000_000
    ),
    "delta-make": Job(
        ("delta", "make", "--base", "llama", "--target", "llava", "--out", "out"), "out", ("out/*",), True, 100_000
    ),
    "delta-apply": Job(
        ("delta", "apply", "--base", "llama", "--delta", "delta", "--out", "out"), "out", ("out/*",), True, 100_000
    ),
    "convert": Job(("convert", "model", "out", "--to", "hf-llava"), "out", ("out/*",), True, 1_000_000),
    "train": Job(
        ("train", "recipe.yaml"), "out", ("out/adapter/adapter_model.safetensors",), True, 50_000
    ),
    "generate": Job(
        ("generate", "--model", "model", "--questions", "questions.jsonl", "--answers", "out.jsonl", "--images",
         "pictures/images", "--max-new-tokens", "4", "--batch-size", "2", "--seed", "1"),
        "out.jsonl", ("out.jsonl",), True, 300,
    ),
    "ocr-build": Job(
        ("ocr", "build", "pictures/images", "--out", "out.json", "--engine", "tesseract", "--workers", "1",
         "--min-letters", "1", "--min-confidence", "0"),
        "out.json", ("out.json",), True, 900,
    ),
    "ocr-converse": Job(
        ("ocr", "converse", "readings.json", "--out", "out.json", "--model", "m", "--base-url", "ENDPOINT",
         "--concurrency", "1", "--least", "1"),
        "out.json", ("out.json",), True, 400,
    ),
    "synth": Job(
        ("synth", "--out", "out", "--n", "6", "--style", "plain", "--workers", "1"),
        "out", ("out/records.json", "out/truth.jsonl", "out/images/*"), False, 600,
    ),
    "eval-vqa": Job(
        ("eval", "vqa", "--dataset", "pictures/dataset.json", "--images", "pictures/images", "--model", "model",
         "--max-new-tokens", "4", "--batch-size", "2", "--out", "out.json"),
        "out.json", ("out.json",), True, 900,
    ),
    "eval-judge": Job(
        ("eval", "judge", "--questions", "judge/questions.jsonl", "--contexts", "judge/contexts.jsonl", "--rules",
         "judge/rules.json", "--reference", "judge/reference.jsonl", "--answers", "judge/answers.jsonl",
         "--judge-model", "m", "--base-url", "ENDPOINT", "--concurrency", "1", "--out", "out.jsonl"),
        "out.jsonl", ("out.jsonl",), True, 500,
    ),
    "report": Job(("report", "run", "--out", "out.html"), "out.html", ("out.html",), False, 5_000),
}  # fmt: skip
_EVERY = os.environ.get("LLAVAR_TORTURE_MATRIX") == "all"
_THINNED = 6


def each(position: int, *faults: tuple[Any, ...]) -> list[Any]:
    """Return the pairs of commands and faults to test.

    All of them take many minutes (`make torture`). Otherwise each command meets every sixth fault, and each fault
    two commands.

    Args:
        position: Number of faults in the tests before this one.
        faults: The arguments of each fault.
    """
    return [
        pytest.param(name, *fault, id="-".join(map(str, (name, *fault))))
        for command, name in enumerate(JOBS)
        for number, fault in enumerate(faults or [()], start=position)
        if _EVERY or (command + number) % _THINNED == 0
    ]


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = REPLY if "Rate them" in json.dumps(request) else TURNS
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_judge_files(folder: Path) -> None:
    folder.mkdir()
    numbers = range(4)
    _lines(
        folder / "questions.jsonl",
        [{"question_id": n, "image": "1.png", "text": f"Which book {n}?", "category": "read"} for n in numbers],
    )
    _lines(folder / "contexts.jsonl", [{"id": "1", "image": "1.png", "captions": "A cover.\n\nTHE BOOK"}])
    (folder / "rules.json").write_text(json.dumps({"read": {"role": "Assistant", "prompt": "Rate them."}}))
    _lines(folder / "reference.jsonl", [{"question_id": n, "text": f"reference {n}"} for n in numbers])
    _lines(folder / "answers.jsonl", [{"question_id": n, "text": f"ours {n}", "answer_id": f"id{n}"} for n in numbers])


def _write_readings(folder: Path) -> None:
    records = folder / "readings.json"
    names = [f"p{number}" for number in range(4)]
    records.write_text(json.dumps([make_ocr_record(name, f"{name}.png", READ, 0) for name in names]))
    corners = ((0.0, 0.0), (90.0, 0.0), (90.0, 20.0), (0.0, 20.0))
    with ResumeJournal(journal_path(records), {"format": 1}) as journal:
        for name in names:
            line = OcrLine(f"{READ} page {name}", corners, 0.9).as_json()
            journal.append({"path": f"{name}.png", "lines": {"a": [line], "b": [line]}})


@pytest.fixture(scope="module")
def workshop(dataset: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs of all commands."""
    folder = tmp_path_factory.mktemp("workshop")
    parts = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
    model, processor = build_model(parts, seed=1)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    save_moved_adapter(folder / "adapter", ModelConfig(checkpoint=str(folder / "model"), dtype="float32"), TUNE)
    llama = draw_llama(1)
    write_folder(folder / "llama", llama, LLAMA)
    write_folder(folder / "llava", make_llava(llama, 3), LLAVA)
    make_delta(folder / "llama", folder / "llava", folder / "delta")
    shutil.copytree(dataset, folder / "pictures")
    rows = json.loads((dataset / "dataset.json").read_text())["data"]
    fields = {"question_id": "question_id", "image": "image", "text": "question"}
    _lines(folder / "questions.jsonl", [{ours: row[key] for ours, key in fields.items()} for row in rows])
    _write_judge_files(folder / "judge")
    _write_readings(folder)
    _write_run(folder, tiny_data)
    return folder


def _write_run(folder: Path, data: Path) -> None:
    recipe = {
        "model": {"checkpoint": "model", "dtype": "float32"},
        "stages": [
            {
                "name": "one", "tune": {"type": "lora", "rank": 2, "alpha": 4, "dropout": 0.1},
                "data": {"records": str(data / "records.json"), "images": str(data / "images"), "holdout": 2,
                         "workers": 0},
                "optim": {"learning_rate": 1e-3}, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32",
                "max_length": 1024, "save_every_steps": 1, "max_steps": 2,
                "probe": {"images": 1, "max_new_tokens": 1},
            }
        ],
        "output_dir": "out",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run_folder = folder / "run"
    (run_folder / "one").mkdir(parents=True)
    (run_folder / "stages.json").write_text('["one"]')
    _lines(run_folder / "one/metrics.jsonl", [{"step": step, "loss": 2.0 / step} for step in (1, 2)])


class Place:
    """A folder with the inputs, by links, in which one job runs."""

    def __init__(self, job: Job, workshop: Path, folder: Path, endpoint: str) -> None:
        self.job, self.folder = job, folder
        folder.mkdir()
        for path in workshop.iterdir():
            (folder / path.name).symlink_to(path)
        self.arguments = [endpoint if part == "ENDPOINT" else part for part in job.arguments]

    def run(self, fault: Fault = no_fault) -> Ended:
        """Run the job's command."""
        return run(self.arguments, self.folder, fault)

    @property
    def result(self) -> dict[str, bytes]:
        """The files that a job is asked for."""
        found = [path for pattern in self.job.compared for path in self.folder.glob(pattern) if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}

    @property
    def left(self) -> list[str]:
        """Hidden files and folders, which only unfinished work may have."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob(".*"))


@dataclass(frozen=True)
class Whole:
    """An undisturbed result, and the number of operations on files that it took."""

    result: dict[str, bytes]
    events: int


@pytest.fixture
def place(name: str, workshop: Path, tmp_path: Path, endpoint: str) -> Place:
    if name == "ocr-build" and shutil.which("tesseract") is None:
        pytest.skip("tesseract is not installed")
    return Place(JOBS[name], workshop, tmp_path / "place", endpoint)


@pytest.fixture(scope="module")
def whole(workshop: Path, tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Callable[[str], Whole]:
    """Return the undisturbed result of a job, and its number of operations on files."""
    known: dict[str, Whole] = {}

    def get(name: str) -> Whole:
        if name not in known:
            folder = tmp_path_factory.mktemp("whole")
            place = Place(JOBS[name], workshop, folder / "place", endpoint)
            ended = place.run(partial(count_events, JOBS[name].out.split(".")[0], str(folder / "count")))
            assert ended.status == 0, ended.output
            assert place.result
            assert place.left == []
            known[name] = Whole(place.result, int((folder / "count").read_text()))
        return known[name]

    return get


def _assert_resumes(place: Place, whole: Whole) -> None:
    """Check that the same command now gives the undisturbed result, and that nothing is left of the attempts."""
    again = place.run()
    assert again.status == 0, again.output
    assert sorted(place.result) == sorted(whole.result)
    assert [name for name, data in place.result.items() if data != whole.result[name]] == []
    assert place.left == []


def _assert_explained(ended: Ended, *words: str) -> None:
    assert "Traceback" not in ended.output, ended.output
    assert "unexpected" not in ended.output, ended.output
    assert all(word in ended.output for word in ("error: ", *words)), ended.output


@pytest.mark.parametrize(("name", "moment"), each(0, ("first",), ("middle",)))
def test_a_full_disk(name: str, moment: str, place: Place, whole: Callable[[str], Whole]) -> None:
    ended = place.run(full_disk(0 if moment == "first" else place.job.middle))
    assert ended.status == ENVIRONMENT, ended.output
    _assert_explained(ended, place.job.out.split(".")[0], "Fix: ", "run the same command again")
    assert place.result != whole(name).result
    if moment == "first":
        assert place.left == []
    _assert_resumes(place, whole(name))


@pytest.mark.parametrize("name", each(2))
def test_a_read_only_folder(name: str, place: Place, whole: Callable[[str], Whole]) -> None:
    place.folder.chmod(0o555)
    try:
        ended = place.run(obey_permissions)
        assert ended.status == ENVIRONMENT, ended.output
        _assert_explained(ended, "cannot be written", "Permission denied", "Fix: ")
        assert place.result == {}
    finally:
        place.folder.chmod(0o755)
    _assert_resumes(place, whole(name))


@pytest.mark.parametrize(("name", "kind"), each(3, ("file",), ("through a file",), ("dangling link",)))
def test_an_output_that_cannot_exist(name: str, kind: str, place: Place) -> None:
    """A file where a folder is expected, a folder where a file is, a parent that is a file or a link to nothing."""
    out = place.folder / place.job.out
    if kind == "file":
        out.mkdir() if out.suffix else out.write_text("mine")
    else:
        parent = place.folder / "parent"
        parent.write_text("mine") if kind == "through a file" else parent.symlink_to("nowhere")
        changed = str(Path("parent") / place.job.out)
        place.arguments = [changed if part == place.job.out else part for part in place.arguments]
        if place.arguments[0] == "train":
            place.arguments.append(f"output_dir={changed}")
    before = sorted(path.name for path in place.folder.iterdir())
    ended = place.run()
    assert ended.status == WRONG_INPUT, ended.output
    _assert_explained(ended, "out" if kind == "file" else "parent", "Fix: ")
    assert sorted(path.name for path in place.folder.iterdir()) == before


@pytest.mark.parametrize(("name", "share"), each(6, (0.5,), (0.95,)))
def test_a_kill(name: str, share: float, place: Place, whole: Callable[[str], Whole]) -> None:
    events = whole(name).events
    ended = place.run(signal_at(signal.SIGKILL, place.job.out.split(".")[0], max(1, int(share * events))))
    assert ended.status == -signal.SIGKILL, ended.output
    if "Fix: delete it" in (again := place.run()).output:  # killed after the result got its name
        assert place.result == whole(name).result
        return
    assert again.status == 0, again.output
    assert place.result == whole(name).result
    assert place.left == []


@pytest.mark.parametrize(
    ("name", "number", "share"), each(8, (signal.SIGINT, 0.0), (signal.SIGINT, 0.5), (signal.SIGTERM, 0.5))
)
def test_a_signal(name: str, number: int, share: float, place: Place, whole: Callable[[str], Whole]) -> None:
    events = whole(name).events
    ended = place.run(signal_at(number, place.job.out.split(".")[0], max(1, int(share * events))))
    if ended.status == 0:
        assert name == "train"  # it completes its last step and the result
        assert place.result == whole(name).result
        return
    assert ended.status in (INTERRUPTED, SAVED), ended.output
    _assert_explained(ended, "interrupted")
    if place.job.saves and share:
        assert ended.status == SAVED, ended.output
        assert "run the same command again" in ended.output
    _assert_resumes(place, whole(name))


@pytest.mark.parametrize("name", each(11))
def test_a_second_ctrl_c(name: str, place: Place, whole: Callable[[str], Whole]) -> None:
    middle = whole(name).events // 2
    ended = place.run(signal_at(signal.SIGINT, place.job.out.split(".")[0], middle, middle + 1, middle + 2))
    assert ended.status in (INTERRUPTED, SAVED), ended.output
    _assert_explained(ended, "interrupted")
    _assert_resumes(place, whole(name))


@pytest.mark.parametrize("name", each(12))
def test_two_processes_at_once(name: str, place: Place, whole: Callable[[str], Whole]) -> None:
    both = [Running(place.arguments, place.folder) for _ in range(2)]
    ended = [one.wait() for one in both]
    statuses = sorted(one.status or 0 for one in ended)
    # The second one is refused, finds a finished result, or comes late enough to begin after the first.
    assert statuses in ([0, 0], [0, WRONG_INPUT], [0, ENVIRONMENT]), [one.output for one in ended]
    for one in ended:
        if one.status:
            _assert_explained(one, "another" if one.status == ENVIRONMENT else "exists already")
    assert place.result == whole(name).result
    assert place.left == []
