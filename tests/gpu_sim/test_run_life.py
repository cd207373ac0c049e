"""A run's life on a GPU: it is interrupted and resumed, merged between stages, and its result answers: simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llavar_peft import Recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from tests.gpu_sim import inference_cases
from tests.gpu_sim.recipes import TUNES, small_recipe
from tests.gpu_sim.simulation import Simulation

pytestmark = pytest.mark.slow
_SETTINGS: dict[str, Any] = {"packing": True, "gradient_checkpointing": "auto", "precision": "bf16"}
_RUNS = {"rows": _SETTINGS, "qlora": {**_SETTINGS, "gradient_checkpointing": True}}
"""Settings of tunings; those of the matrix where it has them, whose runs are then used."""


@pytest.mark.parametrize("tune", _RUNS)
def test_a_resumed_run_continues_exactly(
    tune: str, simulation: Simulation, on_gpu: Callable[..., dict[str, Any]], base_recipe: Recipe, tmp_path: Path
) -> None:
    whole = on_gpu(tune, **_RUNS[tune])
    recipe = small_recipe(base_recipe, tune, output_dir=str(tmp_path / "run"), **_RUNS[tune])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    resumed = simulation.run(
        "tests.gpu_sim.training_cases:train_in_two_parts", recipe=str(tmp_path / "recipe.yaml"), interrupt_at=0
    )
    assert [line["loss"] for line in resumed["metrics"]] == [line["loss"] for line in whole["metrics"]]
    ours, theirs = (load_file(Path(one["result"]) / "adapter_model.safetensors") for one in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == one).all()) for name, one in theirs.items())


def test_an_adapter_is_merged_on_the_device_between_stages(
    simulation: Simulation, on_gpu: Callable[..., dict[str, Any]], base_recipe: Recipe, tmp_path: Path
) -> None:
    first = on_gpu("rows", **_SETTINGS)
    recipe = small_recipe(base_recipe, "rows", output_dir=str(tmp_path / "run"), **_SETTINGS)
    then = dataclasses.replace(recipe.stages[0], name="then", tune=TUNES["full"], max_steps=1)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(dataclasses.replace(recipe, stages=(recipe.stages[0], then))))
    second = simulation.run("tests.gpu_sim.training_cases:train", recipe=str(tmp_path / "recipe.yaml"))
    # The second stage begins with the model that the first one ended with.
    assert second["probe"][0]["held_out_loss"] == pytest.approx(first["probe"][-1]["held_out_loss"], rel=0.01)
    assert (Path(second["result"]) / "model.safetensors").is_file()


@pytest.mark.parametrize("tune", _RUNS)
def test_answers_are_those_of_the_cpu(
    tune: str, simulation: Simulation, on_gpu: Callable[..., dict[str, Any]], base_recipe: Recipe
) -> None:
    """Those of QLoRA come from a base in 4 bits, as its training had."""
    result = on_gpu(tune, **_RUNS[tune])["result"]
    image = str(min(Path(str(base_recipe.stages[0].data.images)).iterdir()))
    case: dict[str, Any] = {"case": "tests.gpu_sim.inference_cases:answer", "result": result, "image": image}
    found = simulation.run(**case, device="gpu:0", dtype="float32")
    half = simulation.run(**case, device="gpu:0", dtype="bfloat16")
    expected = inference_cases.answer(result, image, "cpu", "float32")
    assert (found.pop("device"), expected.pop("device"), half["device"]) == ("gpu:0", "cpu", "gpu:0")
    assert found["quantized"] is half["quantized"] is (tune == "qlora")
    logprobs, expected_logprobs = found.pop("logprobs"), expected.pop("logprobs")
    assert found == expected
    assert [sum(one) for one in logprobs] == pytest.approx([sum(one) for one in expected_logprobs], abs=1e-3)
    with_adapter, without = logprobs[0], logprobs[2]
    assert with_adapter != without
    # The first token's, which depends on no other choice.
    assert half["logprobs"][0][0] == pytest.approx(with_adapter[0], abs=0.1)
