"""Folders of images, created once."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic


@pytest.fixture(scope="session")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of five signs, a smaller copy of one of them, a blank page, and two files that are not images."""
    root = tmp_path_factory.mktemp("signs")
    images = write_synthetic(root, 5, SynthSettings(kinds=("signs",), width=420, seed=4), workers=1).images
    (images / "more").mkdir()
    (images / "signs_000001.png").rename(images / "more" / "signs_000000.png")
    with Image.open(images / "signs_000002.png") as sign:
        sign.resize((sign.width * 4 // 5, sign.height * 4 // 5), Image.Resampling.LANCZOS).save(images / "copy.jpg")
    Image.new("RGB", (300, 200), "white").save(images / "blank.png")
    (images / "broken.png").write_bytes((images / "signs_000003.png").read_bytes()[:200])
    (images / "notes.txt").write_text("no picture")
    return images
