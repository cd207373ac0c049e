"""The simulated device behaves as a CUDA device where the other tests rely on it."""

from __future__ import annotations

import pytest

from tests.gpu_sim import device_cases
from tests.gpu_sim.simulation import Simulation

CASES = "tests.gpu_sim.device_cases"


def test_tensors_and_gradients_are_on_the_device(simulation: Simulation) -> None:
    assert simulation.run(f"{CASES}:describe_device") == {
        "accelerator": "gpu", "weight": "gpu:0", "gradient": "gpu:0", "loaded": "cpu", "copied": "cpu"
    }  # fmt: skip


def test_mixed_devices_are_rejected(simulation: Simulation) -> None:
    assert simulation.run(f"{CASES}:mix_devices") == {
        "vector": "rejected", "number": "accepted", "layer": "rejected", "copy": "accepted", "index": "accepted"
    }  # fmt: skip


def test_waits_are_counted(simulation: Simulation) -> None:
    waits = simulation.run(f"{CASES}:count_waits")
    free = {"non_blocking", "arithmetic", "factory", "where", "scatter"}
    assert waits == {name: int(name not in free) for name in waits}


def test_autocast_follows_the_lists_of_cuda(simulation: Simulation) -> None:
    assert simulation.run(f"{CASES}:autocast_dtypes") == {
        "linear": "bfloat16", "rsqrt": "float32", "softmax": "float32", "layer_norm": "float32", "add": "bfloat16"
    }  # fmt: skip


def test_contexts_can_be_nested(simulation: Simulation) -> None:
    assert simulation.run(f"{CASES}:leave_context") == "gpu:0"


def test_a_failing_case_shows_its_traceback(simulation: Simulation) -> None:
    with pytest.raises(AssertionError, match=r"(?s)in fail\n.*ValueError: the case's own error"):
        simulation.run(f"{CASES}:fail")


def test_pissa_computes_on_the_accelerator_with_a_seed_for_each_layer(simulation: Simulation) -> None:
    found = simulation.run(f"{CASES}:pissa_components", rows=40, columns=24, rank=3)
    expected = device_cases.pissa_components(40, 24, 3)
    assert (found["device"], expected["device"]) == ("gpu:0", "cpu")
    # On the simulated device even the random numbers are the CPU's.
    for row, other in zip(found["product"], expected["product"], strict=True):
        assert row == pytest.approx(other, abs=1e-5)
