"""A short run of the fuzzer: the cases that once failed, and a few of each kind of file. `make fuzz` runs more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.fuzz.__main__ import choose_cases
from tests.fuzz.fuzz_workers import Case, Failure, run_cases
from tests.fuzz.mutations import damage_file
from tests.fuzz.targets import TARGETS, write_request
from tests.fuzz.valid_files import build_valid_files

CASES = 20


@pytest.fixture
def valid_files(tmp_path: Path) -> Iterator[Path]:
    before = Path.cwd()
    build_valid_files(tmp_path)
    write_request(tmp_path)
    yield tmp_path
    os.chdir(before)


def _seeds() -> list[Case]:
    lines = Path(__file__).with_name("seeds.txt").read_text("utf-8").splitlines()
    return [(name, int(seed)) for name, seed in (line.split() for line in lines if not line.startswith("#"))]


@pytest.mark.slow
def test_damaged_files_end_in_messages(valid_files: Path) -> None:
    cases = [*_seeds(), *choose_cases(sorted(set(TARGETS) - {"converse", "resume"}), 0, CASES)]
    ended = list(run_cases(cases, valid_files, workers=1))
    assert len(ended) == len(cases)
    failures = [str(one) for one in ended if isinstance(one, Failure)]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)  # an assertion would shorten the texts


def test_only_a_second_hang_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A case may be slow because a busy machine, or the imports of a new worker, took the time."""
    monkeypatch.setattr("tests.fuzz.fuzz_workers.SECONDS", 0.5)
    monkeypatch.setattr("tests.fuzz.fuzz_workers._run_case", _run_slowly)
    monkeypatch.setenv("ONCE", str(tmp_path / "once"))
    ended = list(run_cases([("once", 1), ("always", 2), ("never", 3)], tmp_path, workers=1))
    assert ended[0] == ("once", 1)
    assert isinstance(ended[1], Failure)
    assert "hang: x; y" in str(ended[1])
    assert str(ended[1]).endswith('make fuzz FUZZ_ARGS="--target always --seed 2"')
    assert ended[2] == ("never", 3)


def _run_slowly(name: str, seed: int, files: Path, connection: Connection) -> None:
    connection.send(("start", ("x", "y")))
    first = not Path(os.environ["ONCE"]).exists()
    Path(os.environ["ONCE"]).touch()
    while name == "always" or (name == "once" and first):
        pass


def test_the_same_seed_damages_a_file_in_the_same_way() -> None:
    import random

    data = b'{"a": [1, 2, {"b": "c"}], "d": 0.5}'
    made = [[damage_file("x.json", data, random.Random(seed)) for seed in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 25
