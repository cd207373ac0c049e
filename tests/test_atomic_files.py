"""Files and folders that appear whole, with the umask's permissions, though several processes write them at once."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavar_peft.atomic_files import commit_folder, hold_lock, write_text
from llavar_peft.errors import EnvironmentFaultError, LlavarError
from llavar_peft.weights.io.folder_writer import FolderWriter
from llavar_peft.weights.io.shard_layout import TensorSpec


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_weights_have_the_permissions_of_other_files(umask: int, tmp_path: Path) -> None:
    staged = tmp_path / ".model.part"
    (staged / "inner").mkdir(parents=True)
    for path in (staged / "model.safetensors", staged / "inner/adapter_model.safetensors"):
        save_file({"weight": torch.zeros(2)}, path)
    (staged / "config.json").write_text("{}")
    commit_folder(staged, tmp_path / "model")
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


_ROUNDS = 400


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_two_processes_that_write_one_file_do_not_mix_it(tmp_path: Path) -> None:
    """Each process writes its own letter, of its own length, as often as it can."""
    path = tmp_path / "out.txt"
    with ForkedWriters() as writers:
        for letter, size in (("a", 70_000), ("b", 40_000), ("c", 90_000)):
            writers.start(_write_often, path, letter * size)
        writers.open_gate()
        seen = {_read_one_letter(path) for _ in range(_ROUNDS)}
    assert writers.statuses == [0, 0, 0]
    assert seen <= {("a", 70_000), ("b", 40_000), ("c", 90_000), None}
    assert [one.name for one in tmp_path.iterdir()] == ["out.txt"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_of_writers_started_together_one_writes_and_the_others_are_refused(tmp_path: Path) -> None:
    """If a process says that the folder is written, it is there: 0.1 lost it in 15 of 800 trials."""
    for trial in range(_ROUNDS // 8):
        out = tmp_path / f"out{trial}"
        with ForkedWriters() as writers:
            for value in (1.0, 2.0):
                writers.start(_write_weights, out, value)
        assert sorted(writers.statuses) in ([0, _REFUSED], [0, _EXISTS]), trial
        stored = load_file(out / "model.safetensors")
        assert {float(tensor.mean()) for tensor in stored.values()} in ({1.0}, {2.0}), trial
        assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == [], trial


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the journal fits then; the writer gives up the space that it has reserved for it."""
    specs = [TensorSpec(f"t{number}", (3,), "float32") for number in range(3)]

    def open_writer() -> FolderWriter:
        return FolderWriter(tmp_path / "out", specs, form="safetensors", shard_size=1 << 20, plan="same")

    synchronize = os.fsync

    def no_space_left(handle: int) -> None:
        if (tmp_path / ".out.part/.reserve").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synchronize(handle)

    writer = open_writer()
    writer.write("t1", [torch.ones(3)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space_left)
        with pytest.raises(EnvironmentFaultError, match=r"out: cannot be written .the disk is full.*it needs 36 bytes"):
            writer.finish()
        writer.pause()
    again = open_writer()
    assert again.done == {"t1"}
    for name in ("t0", "t2"):
        again.write(name, [torch.zeros(3)])
    again.finish()
    again.commit()
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["model.safetensors", "weights_checksums.json"]
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_a_lock_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    """The file of a lock is removed whenever it is released, which must not let two processes in."""
    with ForkedWriters() as writers:
        for _ in range(3):
            writers.start(_enter_often, tmp_path / ".lock", tmp_path / "inside")
    assert writers.statuses == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


_REFUSED, _EXISTS = 3, 2


class ForkedWriters:
    """Children that start at the same moment, and their exit statuses at the end of the context."""

    def __init__(self) -> None:
        self.children: list[int] = []
        self.statuses: list[int] = []

    def __enter__(self) -> ForkedWriters:
        self._gate: tuple[int, ...] = os.pipe()
        return self

    def start(self, function: Callable[..., int], *arguments: object) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(self._gate[1])
                os.read(self._gate[0], 1)  # returns when the parent closes the other end
                status = function(*arguments)
            finally:
                os._exit(status)
        self.children.append(child)

    def open_gate(self) -> None:
        for end in self._gate:
            os.close(end)
        self._gate = ()

    def __exit__(self, *_: object) -> None:
        self.open_gate()
        self.statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]


def _write_often(path: Path, text: str) -> int:
    for _ in range(_ROUNDS // 4):
        write_text(path, text)
    return 0


def _read_one_letter(path: Path) -> tuple[str, int] | None:
    text = path.read_text() if path.exists() else ""
    assert len(set(text)) <= 1
    return (text[0], len(text)) if text else None


def _write_weights(out: Path, value: float) -> int:
    specs = [TensorSpec(f"t{number}", (3,), "float32") for number in range(3)]
    try:
        writer = FolderWriter(out, specs, form="safetensors", shard_size=1 << 20, plan=str(value))
        for spec in specs:
            writer.write(spec.name, [torch.full((3,), value)])
        writer.finish()
        writer.commit()
    except LlavarError as error:
        return error.exit_code
    return 0


def _enter_often(lock: Path, inside: Path) -> int:
    entered = 0
    while entered < _ROUNDS // 8:
        try:
            with hold_lock(lock, where=lock):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another process is inside
                inside.unlink()
                entered += 1
        except EnvironmentFaultError:
            continue
    return 0
