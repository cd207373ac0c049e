"""The plain style of the quickstart: images never change, and their ground truth matches the pixels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
from PIL import Image, ImageChops, ImageDraw, features

from llavar_peft.cli import main
from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.font_faces import open_face
from llavar_peft.datagen.synth.plain_style import draw_layout
from llavar_peft.datagen.synth.synth_settings import KINDS, SynthKind, SynthSettings
from llavar_peft.datagen.synth.write_synthetic import SynthResult, write_synthetic
from llavar_peft.errors import ConfigError

FREETYPE = "2.14.3"
"""The version in Pillow 12.3 and 13.0."""
DRAWN: list[tuple[SynthKind, str, str]] = [
    ("signs", "a93ec508f0ff", "1002adfc4403"),
    ("covers", "1a6078d8fd79", "272dab5963ff"),
    ("posters", "2ec7c71c4017", "a6b107f9eadf"),
    ("receipts", "3da76ab1e601", "2f8d4a196cb3"),
]
"""Kind, and SHA-256 of the conversations and of the pixels, of stage 2's first 24 images in the quickstart."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SynthResult:
    """Return images like those that the packaged tiny models were trained on and the quickstart is measured on."""
    settings = SynthSettings(style="plain", seed=1, width=320, task="conversation")
    return write_synthetic(tmp_path_factory.mktemp("written"), 24, settings, workers=1)


def test_the_quickstarts_conversations_are_unchanged(written: SynthResult) -> None:
    records = json.loads(written.records.read_text())
    for number, (kind, said, _) in enumerate(DRAWN):
        conversations = sha256()
        for record in records[number :: len(DRAWN)]:
            assert record["image"].startswith(f"{kind}_")
            conversations.update(json.dumps(record["conversations"]).encode())
        assert conversations.hexdigest()[:12] == said


@pytest.mark.skipif(features.version("freetype2") != FREETYPE, reason=f"not FreeType {FREETYPE}, which drew the pixels")
def test_the_quickstarts_images_are_unchanged(written: SynthResult) -> None:
    records = json.loads(written.records.read_text())
    for number, (_, _, pixels) in enumerate(DRAWN):
        drawn = sha256()
        for record in records[number :: len(DRAWN)]:
            with Image.open(written.images / record["image"]) as image:
                drawn.update(repr(image.size).encode() + image.convert("RGB").tobytes())
        assert drawn.hexdigest()[:12] == pixels


def test_the_layouts_that_the_tiny_models_are_trained_on_are_unchanged() -> None:
    lines = [
        (line.text, line.size, line.left, line.baseline, Path(line.face).stem)
        for kind in KINDS["plain"]
        for number in range(10)
        for line in draw_layout(kind, Random(f"{kind.removesuffix('s')}/{number}"), most_items=2).lines
    ]
    assert sha256(repr(lines).encode()).hexdigest()[:12] == "6932eb0b5cb6"


def test_a_text_is_drawn_as_pillow_draws_it() -> None:
    """Lines are drawn from separate masks, which give the position of the ink."""
    page = draw_page(SynthSettings(style="plain", kinds=("covers",), width=300), 3)
    paper = page.image.getpixel((0, 0))
    again = Image.new("RGB", page.image.size, paper)
    for line in page.lines:
        font = open_face(line.face, line.size)
        ImageDraw.Draw(again).text((line.left, line.baseline), line.text, line.ink, font, anchor="ls")
    assert ImageChops.difference(page.image, again).getbbox() is None
    ink = Image.new("RGB", again.size, paper)
    around = ImageChops.difference(again, ink).getbbox()
    corners = [corner for quad in page.quads for corner in quad]
    xs, ys = zip(*corners, strict=True)
    assert around == (min(xs), min(ys), max(xs), max(ys))


SCRIPT = """
import json, os, sys
from pathlib import Path
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic

settings = SynthSettings(style="plain", seed=3, width=200, task="conversation")
write_synthetic(Path(sys.argv[1]), 70, settings, workers=2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_a_script_may_draw_with_several_processes(tmp_path: Path) -> None:
    """Forked processes do not run an unguarded script again, and they write the same files as one process."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "two")]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "error"}, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    settings = SynthSettings(style="plain", seed=3, width=200, task="conversation")
    write_synthetic(tmp_path / "one", 70, settings, workers=1)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("one", "two"))
    assert len(one) == 72
    assert one == two


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kinds": ("documents",)}, "use one of signs, covers, posters, receipts"),
        ({"languages": ("de",)}, "plain images are in English"),
        ({"fonts": Path("fonts")}, "plain images use fixed fonts"),
        ({"width": 100}, "use at least 192 for plain images"),
        ({"style": "bold"}, "use one of detailed, plain"),
        ({"task": "guess"}, "use one of transcribe, question, conversation"),
    ],
)
def test_settings_that_the_style_lacks_are_rejected(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SynthSettings(**{"style": "plain", **wrong})  # type: ignore[arg-type]


def test_the_command_draws_plain_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--style", "plain", "--n", "4", "--width", "256", "--distort", "light", "--task", "question"]
    assert main(["synth", "--out", str(tmp_path), *options]) == 0
    records = json.loads((tmp_path / "records.json").read_text())
    truths = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == list(KINDS["plain"])
    for record, truth in zip(records, truths, strict=True):
        answer = record["conversations"][1]["value"]
        assert [record["conversations"][0]["value"].replace("<image>", "").strip(), answer] in truth["questions"]
        left, top, right, bottom = record["box"]
        assert 0 <= left < right <= record["image_width"]
        assert 0 <= top < bottom <= record["image_height"]
        assert record["text_height"] > 0.05 * max(record["image_width"], record["image_height"])
    capsys.readouterr()
    assert main(["synth", "--out", str(tmp_path), "--style", "plain", "--kind", "documents"]) == 2
    assert "Fix: use one of signs" in capsys.readouterr().err
