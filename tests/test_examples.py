"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llavar_peft.data.synthetic import write_dataset

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def test_two_stages_in_python(tmp_path: Path) -> None:
    parts = ROOT / "llavar_peft/assets/tiny"
    for number, task in ((1, "transcribe"), (2, "conversation")):
        write_dataset(tmp_path / f"data{number}", count=4, seed=number, task=task)  # type: ignore[arg-type]
    arguments = [
        f"--language-model={parts / 'language_model'}",
        f"--vision-tower={parts / 'vision_tower'}",
        *(f"--stage{n}={tmp_path / f'data{n}/records.json'}" for n in (1, 2)),
        *(f"--stage{n}-images={tmp_path / f'data{n}/images'}" for n in (1, 2)),
        f"--output-dir={tmp_path / 'run'}",
        "--max-steps=1",
    ]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "two_stage.py"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(tmp_path / "run/model")
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_accelerate_launches_the_package() -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(EXAMPLES / "accelerate/cpu.yaml"),
    ]
    done = subprocess.run([*command, "-m", "llavar_peft", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("llavar-peft ")


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_knows_every_setting(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(path))
    assert settings.num_processes == yaml.safe_load(path.read_text())["num_processes"]
