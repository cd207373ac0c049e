"""What is written for the hub: cards, names and tables of records. No hub takes part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from llavar_peft.data.record_store import open_filled_records, parse_record
from llavar_peft.errors import ConfigError, DataError, ImageError
from llavar_peft.hub.hub_access import is_repository_name
from llavar_peft.hub.hub_card import finish_card
from llavar_peft.hub.hub_contents import Contents, collect_files, hub_names
from llavar_peft.hub.hub_records import write_table


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("me/llavar-13b", True), ("me/a.b_c", True), ("me", False), ("me/", False), ("a/b/c", False),
        ("me/a--b", False), ("me/a..b", False), ("me/a.git", False), ("me/-a", False), ("me/ä", False),
        ("me/" + "a" * 97, False),
    ],
)  # fmt: skip
def test_names_of_repositories(name: str, valid: bool) -> None:
    assert is_repository_name(name) == valid


def test_a_model_that_a_run_trained_gets_a_card_with_its_figures(tmp_path: Path) -> None:
    recipe = {
        "model": {"language_model": "lmsys/vicuna-7b-v1.5", "vision_tower": "openai/clip-vit-large-patch14-336"},
        "stages": [{"name": "tune", "data": {"records": [str(tmp_path / "receipts.json"), "hf://me/records"]}}],
    }
    (tmp_path / "tune").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    probe = {
        "step": 4,
        "when": "end",
        "held_out_loss": 0.5,
        "exact_match": 0.9,
        "character_accuracy": 0.95,
        "count": 100,
    }
    (tmp_path / "tune/metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 1.0}) + "\n")
    (tmp_path / "tune/probe.jsonl").write_text(json.dumps({**probe, "samples": []}) + "\n")
    folder = tmp_path / "model"
    folder.mkdir()
    bases = tuple(recipe["model"].values())  # type: ignore[attr-defined]
    contents = Contents("model", folder, bases, {"model_type": "llavar"})
    card = finish_card(contents, "me/mine", hub_names(contents, ()))
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["base_model"] == list(bases)
    assert fields["datasets"] == ["me/records"]
    assert "- the records `receipts.json`" in card
    assert 'load_chat("me/mine")' in card
    assert "| after tune | 90.0\N{NO-BREAK SPACE}% | 82.6–94.5 |" in card  # Wilson's interval of 90 in 100
    assert str(tmp_path) not in card


def test_a_folder_with_a_link_to_a_private_file_is_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "private.json").write_text("{}")
    folder = tmp_path / "model"
    (folder / ".cache").mkdir(parents=True)
    (folder / ".cache/x").write_text("hidden")
    (folder / "config.json").write_text("{}")
    assert collect_files(Contents("model", folder), {}).keys() == {"config.json"}
    (folder / "merge.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(ConfigError, match="a link out of its folder"):
        collect_files(Contents("model", folder), {})


_ANSWER = {"role": "assistant", "content": "I say <image> so."}
_MARKED = [{"role": "user", "content": "<image> and <image>: which?"}, _ANSWER]
_APART = [
    {"role": "user", "content": [{"type": "text", "text": "<image> is text"}, {"type": "image"}, {"type": "image"}]},
    {"role": "assistant", "content": "Neither."},
]


@pytest.mark.parametrize(
    ("messages", "column"),
    [
        (_MARKED, "conversations"),
        ([{"role": "system", "content": "Be brief."}, *_MARKED], "messages"),
        ([{"role": "system", "content": "Be brief."}, *_APART], "messages"),
    ],
)
def test_records_are_the_same_in_the_table(messages: list[object], column: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    records = [
        {"id": "1", "images": ["a.png", "b.png"], "messages": messages},
        {"id": "2", "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    out.mkdir()
    assert write_table(tmp_path / "records.json", [tmp_path], out) == (2, 2)
    before = open_filled_records([str(tmp_path / "records.json")])
    after = open_filled_records([str(next((out / "data").iterdir()))])
    assert column in after[0]
    for number in range(2):
        expected, got = (parse_record(one[number], one.where(number)) for one in (before, after))
        assert (got.id, got.system, len(got.images)) == (expected.id, expected.system, len(expected.images))
        assert [(turn.role, turn.text) for turn in got.turns] == [(turn.role, turn.text) for turn in expected.turns]
    (tmp_path / "records.json").write_text(
        json.dumps([records[0], {"id": "3", "images": records[0]["images"], "messages": _MARKED}])
    )
    if messages[-2:] == _APART:
        with pytest.raises(DataError, match=r"records\.json:1: marks its images by <image>"):
            write_table(tmp_path / "records.json", [tmp_path], out)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ImageError, match=r"records\.json:0: "):
        write_table(tmp_path / "records.json", [tmp_path], tmp_path / "out")
