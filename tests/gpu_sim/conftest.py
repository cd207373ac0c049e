"""The simulated device for tests, and a small run to train on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu_sim.simulation import Simulation


@pytest.fixture(scope="session")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulation]:
    """Return the process with the simulated device."""
    process = Simulation(tmp_path_factory.mktemp("gpu_sim") / "log.txt")
    yield process
    process.close()
