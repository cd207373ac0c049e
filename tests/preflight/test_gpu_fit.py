"""The GPU that each shipped recipe and preset states is the one that the estimate gives today."""

from __future__ import annotations

import re
from itertools import cycle

import pytest

from llavar_peft.preflight.estimate_stage import estimate_stage
from llavar_peft.preflight.gpu_fit import fit_gpus, smallest_gpu
from llavar_peft.recipe.presets import load_recipe, read_recipe
from llavar_peft.recipe.shipped_recipes import list_presets, list_recipes, shipped_gpu

_GIB = 2**30


def _figures(name: str) -> list[float]:
    """Return the GiB of the second line of a shipped file."""
    return [float(figure) for figure in re.findall(r"([\d.]+) GiB", read_recipe(name).splitlines()[1])]


@pytest.mark.parametrize("name", [name for name in list_recipes() if shipped_gpu(name) != "none"])
def test_a_recipe_states_the_memory_and_the_gpu_of_the_estimate(name: str) -> None:
    recipe = load_recipe(name)
    gpu, peaks = fit_gpus(recipe.model, recipe.stages)
    assert shipped_gpu(name) == gpu
    assert _figures(name) == pytest.approx([peak / _GIB for peak in peaks.values()], rel=0.02, abs=0.06)
    assert re.findall(r"([\w-]+) [\d.]+ GiB", read_recipe(name).splitlines()[1]) == list(peaks)


@pytest.mark.parametrize(("name", "place"), zip(list_presets(), cycle([0, 1]), strict=False))
def test_a_preset_states_those_of_the_stage_that_it_changes(name: str, place: int) -> None:
    """Computed for 7B or for 13B, in turns, because an estimate takes a second."""
    recipe = load_recipe(("llavar-7b", "llavar-13b")[place], preset=name)
    peak = estimate_stage(recipe.model, recipe.stages[-1]).memory.peak
    stated = re.fullmatch(r"(.* GB) for 7B, (.* GB) for 13B", shipped_gpu(name))
    assert stated is not None
    assert stated[place + 1] == smallest_gpu([peak])
    assert _figures(name)[place] == pytest.approx(peak / _GIB, rel=0.02, abs=0.06)


@pytest.mark.parametrize(
    ("gib", "gpus", "expected"),
    [(5.0, 1, "8 GB"), (7.0, 1, "12 GB"), (22.0, 8, "8 x 40 GB"), (79.0, 1, None)],
)
def test_a_gpu_has_room_for_cuda_and_for_the_allocator(gib: float, gpus: int, expected: str | None) -> None:
    assert smallest_gpu([1, int(gib * _GIB)], gpus) == expected
