"""Check, train and ask with photographs and scans, LLaMA's vocabulary and 576 patches per image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.commands import command

QUESTION = "Identify any text visible in the image provided."


def _run(folder: Path, *arguments: str, status: int = 0) -> str:
    done = command(arguments, folder)
    assert done.status == status, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture
def folder(shared_dir: Path, tmp_path: Path) -> Path:
    source = shared_dir / "golden/images/inputs"
    if not source.is_dir():
        pytest.skip(f"no photographs at {source}")
    images = tmp_path / "images"
    images.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, images / path.name)
    records = [
        {
            "id": path.stem,
            "image": path.name,
            "conversations": [
                {"from": "human", "value": f"{QUESTION}\n<image>"},
                {"from": "gpt", "value": f"The words of {path.stem.replace('_', ' ')}."},
            ],
        }
        for path in sorted(images.iterdir())
    ]
    records.append(
        {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    )
    (tmp_path / "records.json").write_text(json.dumps(records))
    return tmp_path


def _recipe(folder: Path, shared_dir: Path) -> Path:
    golden = shared_dir / "golden"
    data = {"records": str(folder / "records.json"), "images": str(folder / "images"), "workers": 0, "holdout": 2}
    common = {"data": data, "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "precision": "fp32"}
    probe = {"images": 1, "max_new_tokens": 4}
    recipe = {
        "model": {
            "language_model": str(golden / "train/vicuna-tiny-v1"),
            "vision_tower": str(golden / "model/clip-tiny-336"),
        },
        "stages": [
            {"name": "stage1", "tune": "projector", "optim": {"learning_rate": 2e-3}, "probe": probe, **common},
            {"name": "stage2", "tune": "full", "optim": {"learning_rate": 2e-5}, "probe": probe, **common},
        ],
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
def test_from_photographs_to_an_answer(folder: Path, shared_dir: Path) -> None:
    assert "0 faults" in _run(folder, "data", "check", str(folder / "records.json"), "--images", str(folder / "images"))
    recipe = _recipe(folder, shared_dir)
    _run(folder, "train", str(recipe))
    model = folder / "run/model"
    config = json.loads((model / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 32003
    assert config["image_seq_length"] == 576
    assert (folder / "run/stage1/model/mm_projector.bin").is_file()
    lines = _run(folder, "data", "inspect", str(folder / "records.json"), "--model", str(model), "--json").splitlines()
    encoded = [json.loads(line) for line in lines]
    assert len(encoded) == len(json.loads((folder / "records.json").read_text()))
    assert all(record["input_ids"].count(32000) == 576 * len(record["images"]) for record in encoded)
    image = folder / "images/text_wide.png"
    assert _run(folder, "ask", "--model", str(model), "--image", str(image), "--max-new-tokens", "4", QUESTION).strip()


@pytest.mark.slow
def test_missing_and_broken_images_are_found_before_the_first_step(folder: Path, shared_dir: Path) -> None:
    recipe = _recipe(folder, shared_dir)
    (folder / "images/cmyk.jpg").unlink()
    output = _run(folder, "train", str(recipe), status=2)
    assert "cmyk.jpg" in output
    assert "Traceback" not in output
    assert not (folder / "run/stage1/metrics.jsonl").exists()
    broken = (folder / "images/text_wide.png").read_bytes()[:200]
    (folder / "images/text_wide.png").write_bytes(broken)
    output = _run(folder, "data", "check", str(folder / "records.json"), "--images", str(folder / "images"), status=2)
    assert "cmyk.jpg" in output
    assert "text_wide.png" in output
