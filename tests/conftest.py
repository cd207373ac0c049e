"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from llavar_peft.compat.deferred_compilation import defer_compilation

# A slow machine must not fail a test.
settings.register_profile("patient", deadline=None, print_blob=True)
settings.load_profile("patient")

# As the command line does, for the same reason.
gc.set_threshold(10_000)
defer_compilation()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # If a shell starts pytest in the background, it and the commands that tests start ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


_LONGEST = (
    "test_quickstart_", "test_two_shards_equal_one_process", "test_every_command_and_python_block_runs",
    "test_two_nodes_stop", "test_the_notebook_runs", "test_two_runs_write_the_same_files",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, while other workers run the rest, so that no worker has one of them at the end."""

    def place(item: pytest.Item) -> int:
        return next((number for number, name in enumerate(_LONGEST) if name in item.nodeid), len(_LONGEST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Keep what was imported out of each garbage collection, of which a training stage does two: half a second each."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder with outputs of the original and other files that are not committed.

    It is named by ``LLAVAR_SHARED``; the default is ``shared/`` next to the repository. A test that needs a missing
    file from it is skipped and names the file.
    """
    return Path(os.environ.get("LLAVAR_SHARED") or Path(__file__).parents[2] / "shared")
