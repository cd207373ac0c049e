"""The wheel and the source distribution: their contents, and the quickstart from the wheel in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from llavar_peft import __version__
from tests.built_package import ROOT, Built, build_package, install, run

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the repository")

_SHIPPED = "llavar_peft/recipe/shipped"
_SMALL_QUICKSTART = """
import dataclasses, json, torch
from llavar_peft.training import quickstart
torch.set_num_threads(1)
quickstart._PAIRS["llavar"] = dataclasses.replace(quickstart._PAIRS["llavar"], images=16)
quickstart._STAGE_1_IMAGES, quickstart._HELD_OUT_IMAGES, quickstart._BLANK_IMAGES = 16, 2, 2
quickstart.usable_cores = lambda: 1
recipe_of = quickstart.quickstart_recipe

def short_recipe(*arguments, **settings):
    recipe = recipe_of(*arguments, **settings)
    stages = [
        dataclasses.replace(one, max_steps=1, data=dataclasses.replace(one.data, holdout=2)) for one in recipe.stages
    ]
    return dataclasses.replace(recipe, stages=tuple(stages))

quickstart.quickstart_recipe = short_recipe
result = quickstart.run_quickstart("run")
print(json.dumps([quickstart.__file__, str(result.page), str(result.model)]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("build")
    return build_package(tmp_path_factory.mktemp("built"))


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_contains_the_package_and_nothing_else(built: Built) -> None:
    """It is built from the source distribution, so that both have every template, font, preset and ``py.typed``."""
    package = {f"llavar_peft/{name}" for name in files_below(ROOT / "llavar_peft")}
    recipes = {f"examples/recipes/{name}" for name in files_below(ROOT / "examples/recipes") if name.endswith(".yaml")}
    assert {"llavar_peft/py.typed", "llavar_peft/page/base.html.j2"} < package
    assert package | recipes <= built.source_names
    expected = package | {name.replace("examples/recipes", _SHIPPED) for name in recipes}
    about = {name for name in built.wheel_names if name.partition("/")[0].endswith(".dist-info")}
    assert built.wheel_names - about == expected
    assert any(name.endswith("/licenses/LICENSE") for name in about)
    assert not {name for name in built.source_names if name.startswith(("tests/", "benchmarks/", "shared/"))}


def test_the_wheel_runs_the_quickstart_in_an_empty_folder(built: Built, tmp_path: Path) -> None:
    programs = install(built.wheel, tmp_path / "environment", dependencies=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    program = str(programs / "llavar-peft")
    assert run([program, "--version"], empty) == f"llavar-peft {__version__}\n"
    done = run([str(programs / "python"), "-c", _SMALL_QUICKSTART], empty)
    module, page, model = json.loads(done.splitlines()[-1])
    assert Path(module).is_relative_to(tmp_path)
    assert "<svg" in Path(page).read_text(encoding="utf-8")
    assert (Path(model) / "model.safetensors").is_file()

    # The shell's completion, which reads the shipped recipes too.
    typed = {"_LLAVAR_PEFT_COMPLETE": "complete_bash", "COMP_WORDS": "llavar-peft train --preset ql", "COMP_CWORD": "3"}
    given = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | typed
    found = subprocess.run([program], cwd=empty, env=given, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["qlora"]
