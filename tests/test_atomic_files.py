"""Folders that are committed whole: their files have the permissions that the umask gives."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llavar_peft.atomic_files import commit_folder


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
