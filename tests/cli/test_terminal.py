"""Output: it fits every encoding, and no text from outside controls the terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from llavar_peft.atomic_files import write_text
from llavar_peft.cli import main
from llavar_peft.cli.output import complain, make_safe, print_table, say, say_json, say_piece

HOSTILE = "\x1b]0;title\x07\x9b31m\u202etxt\u2066\r\x7f\x08"
WIDE = "é 漢字 😀 \udcff"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Streams:
    """The program's streams in an encoding that raises an error for what it does not have."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        self._out, self._err = io.BytesIO(), io.BytesIO()
        self.out, self.err = (io.TextIOWrapper(data, encoding=encoding) for data in (self._out, self._err))

    def show(self, function: Callable[[], object]) -> str:
        """Return what a function prints."""
        with redirect_stdout(self.out), redirect_stderr(self.err):
            function()
        return self.read()

    def read(self) -> str:
        for stream in (self.out, self.err):
            stream.flush()
        return b"".join(data.getvalue() for data in (self._out, self._err)).decode(self.encoding)


@pytest.fixture(params=["utf-8", "ascii", "latin-1", "cp1252"])
def streams(request: pytest.FixtureRequest) -> Iterator[Streams]:
    factory = logging.getLogRecordFactory()
    yield Streams(request.param)
    logging.setLogRecordFactory(factory)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    turns = [{"from": "human", "value": f"<image>\n{HOSTILE}"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([
        {"id": "é 漢字 😀", "image": "é 漢字 😀.png", "conversations": turns},
        {"id": HOSTILE, "image": HOSTILE, "conversations": [{"from": HOSTILE, "value": 1}]},
        {"id": "y", "image": HOSTILE, "conversations": turns},
        {"id": "x", "image": [HOSTILE, 1], HOSTILE: 1, "conversations": HOSTILE},
    ]))  # fmt: skip
    return path


def run(streams: Streams, *arguments: str) -> str:
    said = streams.show(lambda: main(list(arguments)))
    assert said
    assert "Traceback" not in said or "--debug" in arguments
    assert not CONTROL.findall(said)
    return said


def test_records_neither_break_nor_control_the_terminal(streams: Streams, records: Path) -> None:
    said = run(streams, "data", "check", str(records), "--images", str(records.parent))
    assert "4 records" in said
    if streams.encoding == "utf-8":
        assert "é 漢字 😀.png" in said


def test_json_output_is_json_in_every_encoding(streams: Streams, records: Path) -> None:
    said = run(streams, "data", "check", str(records), "--images", str(records.parent), "--json")
    faults = json.loads(said)["faults"]
    assert any("é 漢字 😀.png" in fault["where"] for fault in faults)
    assert any(HOSTILE in fault["where"] for fault in faults)


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "check", f"/none/{WIDE}{HOSTILE}.json"),
        ("train", f"{WIDE}{HOSTILE}.yaml"),
        ("--debug", "train", f"{WIDE}{HOSTILE}.yaml"),
        (f"{WIDE}{HOSTILE}",),
        ("data", "check", f"--{HOSTILE}"),
        ("serve", "--model", "x", "--port", HOSTILE),
        ("eval", "compare", f"{WIDE}{HOSTILE}", "b.json"),
        ("adapter", "show", f"{WIDE}{HOSTILE}"),
        ("report", f"{WIDE}{HOSTILE}"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]).encode("ascii", "replace").decode()[:20],
)
def test_names_in_arguments_neither_break_nor_control_the_terminal(
    arguments: tuple[str, ...], streams: Streams
) -> None:
    run(streams, *arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have such file names")
def test_a_file_name_that_is_not_utf8_is_shown(streams: Streams, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m.json"
    Path(os.fsdecode(path)).write_text("[1]")
    assert r"caf\udce9\x1b[31m.json:0" in run(streams, "data", "check", os.fsdecode(path))


def test_recipe_values_in_messages_are_escaped(streams: Streams, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {json.dumps(HOSTILE)}\n{json.dumps(HOSTILE)}: 1\noutput_dir: {json.dumps(HOSTILE)}\n")
    said = run(streams, "train", str(recipe))
    assert "problem" in said


@pytest.mark.parametrize(
    "show",
    [say, say_piece, complain, lambda text: say_json([text]), lambda text: print_table(("a",), [(text,)])],
    ids=["say", "say_piece", "complain", "say_json", "print_table"],
)
def test_every_way_to_print_is_safe(show: Callable[[str], None], streams: Streams) -> None:
    said = streams.show(lambda: (main(["--version"]), show(f"{WIDE}{HOSTILE}")))  # main prepares the streams
    assert not CONTROL.findall(said)
    assert re.search(r"\\(x|u00)1b\]0;title", said)


def test_logs_of_every_library_are_safe(streams: Streams) -> None:
    streams.show(lambda: main(["recipe", "list"]))
    handler = logging.StreamHandler(streams.err)
    logger = logging.getLogger("a.library.with.its.own.handler")
    logger.addHandler(handler)
    logger.warning("%s", HOSTILE)
    said = streams.show(lambda: logging.getLogger("llavar_peft.test").warning("%s%s", WIDE, HOSTILE))
    logger.removeHandler(handler)
    assert said.count(r"\x1b]0;title") >= 2
    assert not CONTROL.findall(said)


def test_ordinary_text_stays() -> None:
    text = "Ünïcödé\t漢字 العربية\u200f עברית 👩\u200d👩\u200d👧\nline"
    assert make_safe(text) == text
    assert make_safe("a\r\nb") == "a\nb"


def test_pages_hold_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "caf\udce9")
    assert (tmp_path / "page.html").read_text("utf-8") == r"caf\udce9"
