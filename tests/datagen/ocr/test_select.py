"""Records are selected by the text that was read, and by a tiny CLIP with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llavar_peft.cli import main
from llavar_peft.datagen.ocr.image_categories import LEAST_SIMILARITY, OTHER, PROMPTS


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Return four records: little text, small text, much text, and an image that is broken."""
    rows, readings = [], [{"format": 3}]
    for number, (count, height) in enumerate(((1, 20), (4, 2), (4, 20), (4, 20))):
        name = f"{number}.png"
        Image.effect_noise((100, 200), 90).convert("RGB").save(tmp_path / name)
        lines: list[Any] = [["WORD", [0, 0, 100, 0, 100, height, 0, height], 0.9]] * count
        stamp = {"width": 100, "height": 200, "hash": "0", "blank": False}
        readings.append({"path": name, **stamp, "lines": {"rapidocr": [*lines, ["??", [0] * 8, 0.1]]}})
        rows.append({"id": name, "image": name, "conversations": []})
    (tmp_path / "3.png").write_bytes(b"no image")
    (tmp_path / "records.ocr.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in readings))
    (tmp_path / "records.report.json").write_text(json.dumps({"folder": str(tmp_path)}))
    (tmp_path / "records.json").write_text(json.dumps(rows))
    return tmp_path / "records.json"


def select(records: Path, *options: str) -> list[dict[str, Any]]:
    out = records.with_name("chosen.json")
    assert main(["ocr", "select", str(records), "--out", str(out), *options]) == 0
    chosen: list[dict[str, Any]] = json.loads(out.read_text("utf-8"))
    return chosen


def test_text_richness(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["id"] for row in select(records, "--min-lines", "2")] == ["1.png", "2.png", "3.png"]
    rich = select(records, "--min-share", "0.2")
    assert [(row["id"], row["text_lines"], row["text_share"]) for row in rich] == [("2.png", 4, 0.4), ("3.png", 4, 0.4)]
    assert "2 dropped: little text" in capsys.readouterr().out
    assert main(["ocr", "select", str(records), "--out", str(records.with_name("o.json")), "--min-lines", "9"]) == 2
    assert "no record is kept (4 little text)" in capsys.readouterr().err


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Return the folder of a CLIP with random weights, whose tokens are bytes."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path / "clip"
    folder.mkdir()
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(words)},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


def test_categories_are_those_of_the_clip(records: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import CLIPModel, CLIPProcessor

    names = ["poster", "book cover", "logo"]
    options = ["--clip", str(clip), *(part for name in names for part in ("--category", name))]
    rows = select(records, *options)
    assert "1 dropped: broken image" in capsys.readouterr().out
    assert len(rows) == 3
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    for row in rows:
        with Image.open(records.with_name(row["image"])) as image, torch.no_grad():
            means = []
            for name in names:
                prompts = [prompt.format(name) for prompt in PROMPTS]
                given = processor(text=prompts, images=image, return_tensors="pt", padding=True)
                seen = model(**given)
                mean = seen.text_embeds.mean(dim=0)
                means.append(float(mean @ seen.image_embeds[0] / mean.norm()))
        assert row["similarity"] == pytest.approx(max(means), abs=2e-3)
        assert row["category"] == (names[means.index(max(means))] if max(means) >= LEAST_SIMILARITY else OTHER)
    kept = rows[0]["category"]
    assert all(row["category"] == kept for row in select(records, *options, "--keep", kept))


def test_options_that_do_not_fit_are_named(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ocr", "select", str(records), "--out", str(tmp_path / "o.json")]
    assert main([*command, "--category", "poster", "--category", "logo"]) == 2
    assert "together" in capsys.readouterr().err
    both = ["--clip", str(tmp_path), "--category", "poster", "--category", "logo"]
    assert main([*command, *both, "--keep", "memes"]) == 2
    assert "is no category (got 'memes')" in capsys.readouterr().err
    assert main([*command, *both]) == 2
    assert "has no CLIP that can be loaded" in capsys.readouterr().err
    records.write_text('[{"image": ["a.png"]}]')
    assert main(command) == 2
    assert "is no list of records with one image each" in capsys.readouterr().err
