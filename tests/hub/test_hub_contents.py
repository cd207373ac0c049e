"""What is written for the hub: cards, names and tables of records. No hub takes part."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from llavar_peft.data.image_files import decode_image, open_image
from llavar_peft.data.record_store import open_filled_records, parse_record
from llavar_peft.errors import ConfigError, DataError, ImageError
from llavar_peft.hub.hub_access import is_repository_name
from llavar_peft.hub.hub_card import finish_card
from llavar_peft.hub.hub_contents import Contents, hub_names, open_contents, split_card
from llavar_peft.hub.hub_files import collect_files
from llavar_peft.hub.hub_records import write_table
from llavar_peft.types import EmbeddedImage
from llavar_peft.weights.io.weights_card import CARD_FILE, write_weights_card
from tests.pdf_files import paragraph, pdf


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


def test_states_of_a_training_and_other_files_stay_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a trainer's checkpoint has them; its manifest names the files of records, and pickles run code."""
    pushed = ["adapter_config.json", "adapter_model.safetensors", "README.md", "LICENSE.txt", "merges.txt", "chart.png"]
    kept = [
        "optimizer.pt", "optimizer_0_of_2.safetensors", "scheduler.pt", "rng_state_0.pth", "training_args.bin",
        "trainer_state.json", "manifest.json", "id_rsa", "notes.txt", "checkpoint-3/adapter_model.safetensors",
    ]  # fmt: skip
    for name in (*pushed, *kept, ".env"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert collect_files(Contents("adapter", tmp_path), {}).keys() == set(pushed)
    assert f"{tmp_path}: not pushed, because no part of the result: " in caplog.text
    assert "and 5 more" in caplog.text


def test_paths_are_replaced_in_every_file_of_settings(tmp_path: Path) -> None:
    """Also below the folder, as `adapter bake` writes an adapter there; other values that resemble names stay."""
    settings = {
        "config.json": {"model_type": "llama", "mm_vision_tower": "/data/clip", "text_config": {"x": "/home/me/llama"}},
        "adapter/base.json": {"checkpoint": str(tmp_path), "dtype": "llama", "vision_tower": "../llama"},
        "adapter/adapter_config.json": {"base_model_name_or_path": str(tmp_path), "peft_type": "LORA"},
        "tokenizer_config.json": {"name_or_path": "/home/me/llama", "extra_special_tokens": ["/s", "~"]},
    }
    (tmp_path / "adapter").mkdir()
    for name, value in settings.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "adapter/recipe.yaml").write_bytes(b'# Trained\nimages: "/data/r\\xe9cu"\nrecords: ~/a\n')
    files = collect_files(Contents("model", tmp_path), {"llama": "me/llama", "../llama": "me/llama"}, "me/mine")
    got = {name: json.loads(data) for name, data in files.items() if isinstance(data, bytes) and name.endswith("n")}
    assert got["config.json"] == {"model_type": "llama", "mm_vision_tower": "clip", "text_config": {"x": "me/llama"}}
    assert got["adapter/base.json"] == {"checkpoint": "me/mine", "dtype": "llama", "vision_tower": "me/llama"}
    assert got["adapter/adapter_config.json"]["base_model_name_or_path"] == "me/mine"
    assert got["tokenizer_config.json"] == {"name_or_path": "me/llama", "extra_special_tokens": ["/s", "~"]}
    assert yaml.safe_load(files["adapter/recipe.yaml"]) == {"images": "r\xe9cu", "records": "a"}


@pytest.mark.parametrize("name", ["merge.json", "recipe.yaml", "README.md"])
def test_files_that_cannot_be_read_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff: [" if name == "README.md" else b"{[")
    contents = Contents("model", tmp_path, ("me/base",), {})
    make = partial(finish_card, contents, "me/mine") if name == "README.md" else partial(collect_files, contents)
    with pytest.raises(ConfigError, match=f"{name}: .*Fix: "):
        make({"me/base": "me/base"})


@pytest.mark.parametrize("folder", ["odd---", "a\n---\nb: c", "x`# y|", "\udcff"])
def test_names_of_folders_do_not_change_the_fields_of_a_card(folder: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llavar"}')
    write_weights_card(tmp_path, f"{folder} merged", {"base": f"/data/{folder}"})
    fields, body = split_card((tmp_path / CARD_FILE).read_text())
    assert (fields["base_model"], fields["pipeline_tag"]) == (folder, "image-text-to-text")
    assert "merged\n\n## Made from\n\n- base `" in body
    card = finish_card(Contents("model", tmp_path, (folder,), {}), "me/mine", {folder: "me/base"})
    assert split_card(card)[0]["base_model"] == "me/base"


def test_a_card_with_fields_of_odd_types_is_completed(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text("---\nbase_model: 7\ntags: {a: 1}\nlicense: mit\n---\ntext --- more\n")
    fields, body = split_card(finish_card(Contents("model", tmp_path, (), {}), "me/mine", {"": "me/base"}))
    assert (fields["base_model"], fields["license"], "llavar" in fields["tags"]) == ("me/base", "mit", True)
    assert "text --- more" in body


def test_the_form_that_peft_writes_is_no_card(tmp_path: Path) -> None:
    form = "---\nlibrary_name: peft\nbase_model: base\n---\n\n# Model Card for Model ID\n\n[More Information Needed]\n"
    (tmp_path / CARD_FILE).write_text(form)
    fields, body = split_card(finish_card(Contents("adapter", tmp_path, ("base",), {}), "me/mine", {"base": "me/base"}))
    assert (fields["library_name"], fields["base_model"]) == ("peft", "me/base")
    assert "Needed" not in body
    assert "- `me/base`" in body
    assert "llavar-peft ask --model me/mine" in body


@pytest.mark.parametrize("kind", ["llama", "clip_vision_model"])
def test_parts_of_a_model_are_not_pushed_as_one(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"a '{kind}', expected a LLaVAR. Fix: "):
        open_contents(tmp_path)


@pytest.mark.parametrize(
    ("resolution", "runs"), [({"type": "cross_attention"}, False), ({"type": "tiles", "pool": 2}, False), (None, True)]
)
def test_a_card_names_no_engine_that_rejects_the_model(resolution: object, runs: bool, tmp_path: Path) -> None:
    config = {"model_type": "llavar", "resolution": resolution}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = finish_card(Contents("model", tmp_path, ("me/base",), config), "me/mine", {"me/base": "me/base"})
    assert ("vllm serve" in card) is runs


def test_pages_of_documents_become_images(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    (tmp_path / "a.pdf").write_bytes(pdf(paragraph("first"), paragraph("second")))
    records = [{"id": "1", "image": "a.pdf#page=2", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "second"}]}]  # fmt: skip
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "out").mkdir()
    assert write_table(tmp_path / "records.json", [], tmp_path / "out") == (1, 1)
    after = open_filled_records([str(next((tmp_path / "out/data").iterdir()))])
    image = parse_record(after[0], "").images[0]
    assert isinstance(image, EmbeddedImage)
    assert image.path == "a-page-2.png"
    expected, got = open_image(tmp_path / "a.pdf#page=2"), decode_image(bytes(image.data), "it")
    assert got.tobytes() == expected.tobytes()
    records[0]["image"] = "a.pdf#page=3"
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "again").mkdir()
    with pytest.raises(ImageError, match=r"a\.pdf#page=3"):
        write_table(tmp_path / "records.json", [], tmp_path / "again")


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
