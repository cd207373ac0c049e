"""What all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("patient", deadline=None, print_blob=True)
settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell that starts pytest in the background makes it ignore Ctrl-C, and so would the commands that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test comes first: other workers do the rest meanwhile."""
    items.sort(key=lambda item: "test_quickstart" not in item.nodeid)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the original's outputs and files that are not committed.

    ``LLAVAR_SHARED`` names it, else it is ``shared/`` beside the repository. It may be missing: a test that needs
    something in it skips and says what.
    """
    return Path(os.environ.get("LLAVAR_SHARED") or Path(__file__).parents[2] / "shared")
