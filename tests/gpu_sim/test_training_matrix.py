"""Every tuning trains on a GPU, packed and padded, with and without checkpointing, in bf16 and fp16: simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu_sim.recipes import MATRIX, STEPS, TUNES, Combination
from tests.gpu_sim.training_cases import TrainedRun

# Relative. The device's autocast computes other operations in float32 than the CPU's; fp16 rounds weights differently.
TOLERANCES = {"bf16": 0.01, "fp16": 0.03}
# A step waits once, for its figures. The loss scaler of fp16 asks for overflows by itself.
WAITS = {"bf16": 1, "fp16": 2}

pytestmark = pytest.mark.slow


def _run(on_gpu: Callable[..., dict[str, Any]], one: Combination) -> dict[str, Any]:
    return on_gpu(one.tune, packing=one.packing, gradient_checkpointing=one.checkpointing, precision=one.precision)


def _name(one: Combination) -> str:
    return f"{one.tune}-{'packed' if one.packing else 'padded'}-{one.checkpointing}-{one.precision}"


def test_the_matrix_covers_what_it_says() -> None:
    assert len({one[1:] for one in MATRIX}) == 12
    for name in TUNES:
        runs = [one for one in MATRIX if one.tune == name]
        assert {one.packing for one in runs} == {True, False}
        assert {one.precision for one in runs} == {"bf16", "fp16"}
        assert len({one.checkpointing for one in runs}) == 2


@pytest.mark.parametrize("one", MATRIX, ids=_name)
def test_losses_are_those_of_the_cpu_and_a_step_waits_once(
    one: Combination, on_gpu: Callable[..., dict[str, Any]], on_cpu: Callable[[str], TrainedRun]
) -> None:
    """One test for both, so that no two processes of a test run train the same."""
    figures = _run(on_gpu, one)
    _check_losses(figures, on_cpu(one.tune).figures, TOLERANCES[one.precision])
    assert len(figures["syncs"]) == STEPS - 1
    for step in figures["syncs"]:
        assert sum(step.values()) <= WAITS[one.precision], step


def _check_losses(figures: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert figures["devices"] == ["gpu:0"]
    losses = [line["loss"] for line in figures["metrics"]]
    assert losses == pytest.approx([line["loss"] for line in expected["metrics"]], rel=tolerance)
    held_out = [line["held_out_loss"] for line in figures["probe"]]
    assert held_out == pytest.approx([line["held_out_loss"] for line in expected["probe"]], rel=tolerance)
    assert held_out[-1] < held_out[0]
    assert all(len(line["samples"]) == 1 for line in figures["probe"])
    for number in ("tokens", "supervised_tokens"):
        assert [line[number] for line in figures["metrics"]] == [line[number] for line in expected["metrics"]]


def test_several_passes_and_the_average_by_token_wait_no_more(on_gpu: Callable[..., dict[str, Any]]) -> None:
    figures = on_gpu("lora", max_length=256, max_tokens=256, loss_average="token", micro_batch_size=4, max_steps=3)
    assert max(line["tokens"] for line in figures["metrics"]) > 256  # more than one pass
    assert all(sum(step.values()) <= 1 for step in figures["syncs"]), figures["syncs"]
