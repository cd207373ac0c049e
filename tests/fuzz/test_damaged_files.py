"""A short run of the fuzzer: the cases that once failed, and a few of each kind of file. `make fuzz` runs more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.__main__ import choose_cases
from tests.fuzz.fuzz_workers import Case, Failure, run_cases
from tests.fuzz.mutations import damage_file
from tests.fuzz.targets import TARGETS, write_request
from tests.fuzz.valid_files import build_valid_files

CASES = 120


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
    assert [str(one) for one in ended if isinstance(one, Failure)] == []


def test_the_same_seed_damages_a_file_in_the_same_way() -> None:
    import random

    data = b'{"a": [1, 2, {"b": "c"}], "d": 0.5}'
    made = [[damage_file("x.json", data, random.Random(seed)) for seed in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 25
