"""Both engines on drawn text whose words and positions are known."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from llavar_peft.data.text_metrics import character_accuracy
from llavar_peft.datagen.ocr.ocr_engines import open_ocr_engine
from llavar_peft.datagen.ocr.ocr_lines import EngineName
from llavar_peft.datagen.ocr.ocr_quality import transcribe
from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.errors import MissingDependencyError


@pytest.fixture(params=["rapidocr", "tesseract"])
def engine(request: pytest.FixtureRequest) -> Any:
    name: EngineName = request.param
    if name == "rapidocr":
        pytest.importorskip("rapidocr")
        pytest.importorskip("onnxruntime")
    elif shutil.which("tesseract") is None:
        pytest.skip("the program tesseract is not installed")
    return open_ocr_engine(name)


@pytest.mark.slow
def test_text_is_read_with_its_position(engine: Any) -> None:
    page = draw_page(SynthSettings(kinds=("documents",), width=900), 0)
    lines = engine.read(page.image)
    assert character_accuracy(transcribe(lines), page.transcript) > 0.97
    assert all(0 <= line.confidence <= 1 for line in lines)
    assert sum(line.confidence > 0.8 for line in lines) > len(lines) * 0.8
    for line in lines:
        (left, top), _, (right, bottom), _ = line.polygon
        assert -5 <= left < right <= 905
        assert any(abs((top + bottom) / 2 - (quad[0][1] + quad[2][1]) / 2) < 12 for quad in page.quads), (
            f"{line} is beside every line that was drawn"
        )


@pytest.mark.slow
def test_a_blank_page_has_no_text(engine: Any) -> None:
    assert engine.read(Image.new("RGB", (400, 300), "white")) == ()
    assert engine.read(Image.new("RGB", (3, 500), "black")) == ()


def test_denormal_numbers_are_flushed() -> None:
    """With them, detection takes more than twice as long. In a new process: ONNX Runtime's first session decides."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    script = """
import numpy
from PIL import Image
from llavar_peft.datagen.ocr.ocr_engines import open_ocr_engine
denormal = numpy.full(8, 1e-40, numpy.float32)
print((2 * denormal).any())
assert open_ocr_engine("rapidocr").find(Image.new("RGB", (64, 64), "white")) == ()
print((2 * denormal).any())
import torch
assert open_ocr_engine("rapidocr").find(Image.new("RGB", (64, 64), "white")) == ()
print((2 * denormal).any())
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "True"]


def test_a_missing_engine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match="apt-get install tesseract-ocr"):
        open_ocr_engine("tesseract")


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="the program tesseract is not installed")
def test_a_language_that_is_not_installed() -> None:
    with pytest.raises(MissingDependencyError, match="cannot read xxx"):
        open_ocr_engine("tesseract", "eng+xxx")
