"""A small model that answers, though nothing sensible, and images to ask it about."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from llavar_peft import ModelConfig, build_model
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tiny parts with a projector that is not trained."""
    parts = Path(str(files("llavar_peft") / "assets/tiny"))
    model, processor = build_model(
        ModelConfig(
            language_model=str(parts / "language_model"), vision_tower=str(parts / "vision_tower"), dtype="float32"
        )
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images, and a data set of a question on each: ``dataset.json``."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = write_synthetic(folder, 5, SynthSettings(style="plain", seed=4, task="question"))
    records = json.loads(drawn.records.read_text())
    rows = [
        {
            "question_id": number,
            "question": record["conversations"][0]["value"].replace("<image>", "").strip(),
            "answers": [record["conversations"][1]["value"]],
            "image": record["image"],
            "text_height": 20,
            "kind": record["image"].split("_")[0],
        }
        for number, record in enumerate(records)
    ]
    (folder / "dataset.json").write_text(json.dumps({"data": rows}))
    return folder
