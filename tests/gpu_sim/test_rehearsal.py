"""What only a GPU can show runs to its end where there is none, so that its mistakes are not met on rented hardware."""

from __future__ import annotations

import pytest

from tests.gpu_sim.simulation import Simulation

pytestmark = pytest.mark.slow
_EXPENSIVE = "parity", "resumed", "qlora", "liger-full", "128"
"""Tests that ``python -m tests.gpu_sim.rehearsal`` runs as well; other tests of this folder take the same way."""


def test_the_tests_of_a_gpu_run_on_the_simulated_one(simulation: Simulation) -> None:
    chosen = " and ".join(f"not {one}" for one in _EXPENSIVE)
    outcomes = simulation.run("tests.gpu_sim.rehearsal:run_tests", arguments=["-k", chosen])
    others = {name: outcome for name, outcome in outcomes.items() if outcome != "passed"}
    assert len(outcomes) - len(others) >= 9, outcomes
    assert all("could not import" in outcome for outcome in others.values()), others
    assert {name.rpartition("[")[2] for name in others} <= {"flash_attention_2]", "compile-lora]"}


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "LoRA", "rank": 4, "quantize": None, "batch": 2, "longest": None, "recompute": "auto"},
        {"name": "QLoRA", "rank": 4, "quantize": "nf4", "batch": 1, "longest": 256, "recompute": True, "cap_gib": 24.0},
    ],
    ids=["lora", "qlora"],
)
def test_the_benchmark_of_a_gpu_runs_on_the_simulated_one(changes: dict[str, object], simulation: Simulation) -> None:
    pytest.importorskip("bitsandbytes")
    cell = {"size": "tiny", "steps": 3, "lengths": "stage2", "cap_gib": None, **changes}
    found = simulation.run("tests.gpu_sim.rehearsal:measure_cell", cell=cell)
    assert found["device"] == "gpu"
    assert found["tokens_per_second"] > 0
    assert found["peak_gib"] == 0  # memory is not simulated
