"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("patient", deadline=None, print_blob=True)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the original's outputs and files that are not committed.

    ``LLAVAR_SHARED`` names it, else it is ``shared/`` beside the repository. It may be missing: a test that needs
    something in it skips and says what.
    """
    return Path(os.environ.get("LLAVAR_SHARED") or Path(__file__).parents[2] / "shared")
