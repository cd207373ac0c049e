"""What the original's code computed, unpacked from the committed archives."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

ARCHIVES = Path(__file__).parents[1] / "golden/original"


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``train``, ``model`` and ``generate``; see tests/golden/original/make_archives.py."""
    folder = tmp_path_factory.mktemp("original")
    for archive in sorted(ARCHIVES.glob("*.tar.xz")):
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    shutil.copytree(ARCHIVES.parent / "images", folder / "images")
    return folder
