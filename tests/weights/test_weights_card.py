"""The model cards of merged, converted and applied weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llavar_peft.weights.io.weights_card import CARD_FILE, portable_name, write_weights_card

RECIPE = "# Trained by stage: tune\nstages:\n- name: tune\n  data: {records: /home/me/receipts.json}\n"
ADAPTER_CARD = "# tune\n\n## Results\n\n| Figure | Value |\n|---|---|\n| held-out loss | 0.5 |\n"


def write(folder: Path, config: dict[str, object], **options: object) -> tuple[dict[str, object], str]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights_card(folder, "Mine", {"base": "/home/me/llavar-13b", "vision tower": "openai/clip"}, **options)
    _, head, text = (folder / CARD_FILE).read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_merged_model_names_base_adapter_data_and_figures(tmp_path: Path) -> None:
    adapter = tmp_path / "receipts/adapter"
    adapter.mkdir(parents=True)
    (adapter / "recipe.yaml").write_text(RECIPE)
    (adapter / CARD_FILE).write_text(ADAPTER_CARD)
    fields, text = write(tmp_path / "merged", {"model_type": "llavar"}, adapters=[adapter], figures={"gap": "1e-4"})
    assert fields["base_model"] == "llavar-13b"
    assert "merge" in fields["tags"]
    assert "- adapter `receipts`, trained on `receipts.json`" in text
    assert "| gap | 1e-4 |" in text
    assert "| `receipts`, before the merge: held-out loss | 0.5 |" in text
    assert "/home/me" not in text


def test_an_adapter_without_recipe_and_card_is_named(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/recipe.yaml").write_text("# Trained by stage: x\nstages: 3\n")
    _, text = write(tmp_path / "merged", {"model_type": "llavar"}, adapters=[tmp_path / "theirs"])
    assert "- adapter `theirs`\n" in text
    assert "## Results" not in text


@pytest.mark.parametrize(
    ("config", "options", "use", "library"),
    [
        ({"model_type": "llavar", "text_config": {}}, {}, "load_chat(", "llavar_peft"),
        ({"model_type": "llava", "text_config": {}}, {}, "pipeline(", "transformers"),
        ({"model_type": "llava"}, {}, "--to llavar --vision-tower", "llavar_peft"),
        ({"model_type": "llava"}, {"delta": True}, "delta apply --base BASE", "llavar_peft"),
    ],
)
def test_the_card_says_how_to_load_the_layout(
    config: dict[str, object], options: dict[str, object], use: str, library: str, tmp_path: Path
) -> None:
    fields, text = write(tmp_path / "model", config, **options)
    assert use in text
    assert fields["library_name"] == library


def test_names_mean_the_same_on_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/llavar").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "hub/models--lmsys--vicuna-7b-v1.1/snapshots/abc"
    names = ["models/llavar", tmp_path / "models/llavar", "./models/llavar/", "lmsys/vicuna-7b", cache, "/gone/llavar"]
    expected = ["llavar", "llavar", "llavar", "lmsys/vicuna-7b", "lmsys/vicuna-7b-v1.1", "llavar"]
    assert [portable_name(name) for name in names] == expected
