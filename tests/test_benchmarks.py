"""The benchmark of weights works, and what it compares gives the same numbers. Times are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The inputs, with the scripts importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import weights_inputs

    weights_inputs.write_inputs(tmp_path / "tiny", "tiny")
    return tmp_path / "tiny"


def test_every_contender_gives_what_ours_gives(tiny: Path, tmp_path: Path) -> None:
    import weights
    import weights_check
    import weights_contenders

    assert {task: tuple(names) for task, names in weights_contenders.CONTENDERS.items()} == weights.CONTENDERS
    for task, contenders in weights_contenders.CONTENDERS.items():
        (tmp_path / task).mkdir()
        for name, contender in contenders.items():
            contender(tiny, tmp_path / task / name)
        ours, peer, *_, loop, copied = (tmp_path / task / name for name in contenders)
        base = tiny / "checkpoint" if task == "merge" else None
        assert weights_check.compare(ours, peer, base)["equal"]
        assert not weights_check.compare(ours, loop, base)["equal"]
        source = tiny / {"make": "target", "apply": "delta", "merge": "checkpoint"}[task]
        assert [(source / path.name).read_bytes() for path in copied.iterdir()] == [
            path.read_bytes() for path in copied.iterdir()
        ]


def test_a_dry_run_takes_no_disk(tiny: Path, tmp_path: Path) -> None:
    import weights_dry_run
    from weights_inputs import SHAPES

    found = weights_dry_run.dry_run(tmp_path, tiny, SHAPES["small"])
    assert found["bytes"]["delta"] == pytest.approx(333_650_000, rel=1e-3)
    assert found["written"] == pytest.approx(found["bytes"]["delta"], rel=1e-3)
    assert found["asked"] >= sum(found["bytes"].values())
    assert found["disk"] < found["written"] / 10
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    arguments = ["--size=tiny", "--rounds=1", "--tasks", "apply", f"--work={tmp_path}", f"--out={tmp_path / 'found'}"]
    command = [sys.executable, str(BENCHMARKS / "weights.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "found.json").read_text())
    assert list(report["rounds"][0]["apply"]) == ["ours", "in memory", "ours, as released", "loop", "copy"]
    assert report["checks"][0]["apply"]["equal"]
    assert done.stdout == (tmp_path / "found.md").read_text()
    assert "| apply: ours |" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "found.md"]
