"""The simulated device for tests, and runs on it and on the CPU that several tests look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llavar_peft import DataConfig, Full, ModelConfig, OptimConfig, Recipe, Stage
from llavar_peft.recipe.recipe_yaml import dump_recipe
from tests.gpu_sim.recipes import small_recipe
from tests.gpu_sim.simulation import Simulation
from tests.gpu_sim.training_cases import TrainedRun, train_recipe
from tests.training.conftest import short_model, tiny_data, tiny_model  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulation]:
    """Return the process with the simulated device."""
    process = Simulation(tmp_path_factory.mktemp("gpu_sim") / "log.txt")
    yield process
    process.close()


@pytest.fixture(scope="session")
def base_recipe(short_model: ModelConfig, tiny_data: Path) -> Recipe:  # noqa: F811
    """Return a recipe that ``small_recipe`` makes runs of."""
    data = DataConfig(records=str(tiny_data / "records.json"), images=str(tiny_data / "images"), holdout=2, workers=0)
    stage = Stage(
        name="only", data=data, tune=Full(), optim=OptimConfig(learning_rate=1e-3), global_batch_size=4,
        micro_batch_size=2, max_length=1024,
    )  # fmt: skip
    return Recipe(model=short_model, stages=(stage, stage), output_dir="unused", seed=3)


@pytest.fixture(scope="session")
def on_gpu(
    simulation: Simulation, base_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Return a function that trains a tuning on the simulated device; the same arguments train only once."""
    folder = tmp_path_factory.mktemp("gpu_runs")

    @cache
    def run(tune: str, **changes: Any) -> dict[str, Any]:
        name = "-".join(map(str, (tune, *changes.values())))
        recipe = small_recipe(base_recipe, tune, output_dir=str(folder / name), **changes)
        (folder / f"{name}.yaml").write_text(dump_recipe(recipe))
        figures: dict[str, Any] = simulation.run(
            "tests.gpu_sim.training_cases:train", recipe=str(folder / f"{name}.yaml")
        )
        return figures

    return run


@pytest.fixture(scope="session")
def on_cpu(base_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainedRun]:
    """Return a function that trains a tuning on the CPU, under the CPU's autocast; each only once."""
    folder = tmp_path_factory.mktemp("cpu_runs")

    @cache
    def run(tune: str) -> TrainedRun:
        return train_recipe(small_recipe(base_recipe, tune, output_dir=str(folder / tune)))

    return run
