"""Synthetic pictures: the same whoever draws them."""

from __future__ import annotations

from pathlib import Path

from llavar_peft.data.synthetic import write_dataset


def test_processes_draw_what_one_draws(tmp_path: Path) -> None:
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        write_dataset(folder, count=70, seed=3, task="conversation", longest=200, processes=processes)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("1", "2"))
    assert len(one) == 71
    assert one == two
