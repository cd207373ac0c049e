"""The ready-made ways of tuning in adapters/: found by name, alone or over a recipe, and shipped with the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import llavar_peft
from llavar_peft import cli, load_recipe
from llavar_peft.adapter_presets import list_presets
from llavar_peft.config import Lora, Projector
from llavar_peft.errors import ConfigError

ROOT = Path(llavar_peft.__file__).parents[1]
NAMES = ("dora", "lora", "lora-attention-only", "projector-only", "qlora", "rslora")
PLACES = ["model.checkpoint=llavar-13b", "stages.0.data.records=r.json", "output_dir=out"]


def test_they_are_there() -> None:
    assert tuple(sorted(list_presets())) == NAMES
    assert all(20 < len(summary) < 130 for summary in list_presets().values())


@pytest.mark.parametrize("name", NAMES)
def test_alone_it_is_a_recipe_but_for_the_places(name: str) -> None:
    recipe = load_recipe(None, PLACES, preset=name)
    (stage,) = recipe.stages
    assert recipe.model.quantize == ("nf4" if name == "qlora" else None)
    assert isinstance(stage.tune, Projector if name == "projector-only" else Lora)
    if isinstance(stage.tune, Lora):
        assert stage.tune.variant == (name if name in ("dora", "rslora") else "lora")
        assert stage.tune.attention_only == (name == "lora-attention-only")
        assert stage.optim.projector_learning_rate == 2e-5
    with pytest.raises(ConfigError) as raised:
        load_recipe(None, preset=name)
    assert {fault.where for fault in raised.value.faults} == {"stages.0.data.records", "output_dir", "model"}


@pytest.mark.parametrize("name", NAMES)
def test_over_a_recipe_it_changes_the_last_stage_alone(name: str) -> None:
    plain, laid = load_recipe("tiny"), load_recipe("tiny", ["stages.1.optim.warmup_ratio=0.5"], preset=name)
    alone = load_recipe(None, PLACES, preset=name).stages[0]
    assert laid.stages[0] == plain.stages[0]
    last = laid.stages[-1]
    assert (last.tune, last.data, last.name) == (alone.tune, plain.stages[-1].data, "finetune")
    assert (last.optim.learning_rate, last.optim.warmup_ratio) == (alone.optim.learning_rate, 0.5)
    assert last.global_batch_size == plain.stages[-1].global_batch_size


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "show", "qlora"]) == 0
    assert "quantize: nf4" in capsys.readouterr().out
    assert cli.main(["train", "--preset", "qlra"]) == 2
    assert "perhaps you meant 'qlora'" in capsys.readouterr().err
    assert cli.main(["train"]) == 2
    assert "--preset" in capsys.readouterr().err
    assert cli.main(["train", "--preset", "lora", "model.checkpoint=nowhere/at/all", *PLACES[1:]]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_by_preset(tmp_path: Path) -> None:
    """The tiny model, two steps of QLoRA on 4 bits by the preset's name: an adapter comes out."""
    from llavar_peft.data.synthetic import write_dataset

    parts = Path(llavar_peft.__file__).parent / "assets/tiny"
    write_dataset(tmp_path / "data", count=8, seed=1, task="conversation")
    settings = [
        f"model.language_model={parts / 'language_model'}",
        f"model.vision_tower={parts / 'vision_tower'}",
        "model.dtype=float32",
        f"stages.0.data.records={tmp_path / 'data/records.json'}",
        f"stages.0.data.images={tmp_path / 'data/images'}",
        "stages.0.data.workers=0",
        "stages.0.global_batch_size=4",
        "stages.0.max_steps=2",
        f"output_dir={tmp_path / 'run'}",
    ]
    command = [sys.executable, "-m", "llavar_peft", "train", "--preset", "qlora", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (config,) = (tmp_path / "run").glob("**/adapter/adapter_config.json")
    assert json.loads(config.read_text())["r"] == 64
    assert json.loads((config.parent / "base.json").read_text())["quantize"] == "nf4"


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the repository")
def test_a_built_package_has_them(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    built = tmp_path / "build/lib/llavar_peft/presets/adapters"
    assert {path.stem for path in built.glob("*.yaml")} == set(NAMES)
