"""The README's first command trains a tiny LLaVAR to read unseen images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

# It reaches about 0.91, within a margin for the machine's rounding.
LEAST = 0.87


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llavar_peft", *arguments], capture_output=True, text=True, check=False, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_learns_to_read_and_can_be_asked(tmp_path: Path) -> None:
    out = _run("quickstart", "--output-dir", str(tmp_path / "run"))
    result = json.loads((tmp_path / "run/quickstart.json").read_text())
    assert result["before"] <= 0.02
    assert result["blank_exact_match"] <= 0.03
    assert result["exact_match"] >= LEAST
    assert result["model"] in out
    page = Path(result["page"]).read_text()
    assert len(page) < 3_000_000
    assert "http://" not in page
    assert "https://" not in page

    # An image with another font and of another size.
    image = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(image).text((60, 60), "KHABE", "black", ImageFont.load_default(70))
    image.save(tmp_path / "mine.png")
    answer = _run(
        "ask", "--model", result["model"], "--image", str(tmp_path / "mine.png"), "--temperature", "0",
        "What does the sign say?",
    ).strip()  # fmt: skip
    assert 2 <= len(answer) <= 12
    assert answer.upper() == answer
