"""Every example of the page on data formats is read, by the reader of training, as the page says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

import llavar_peft
from llavar_peft.cli import main
from llavar_peft.data.check_records import check_records
from llavar_peft.data.hub_sources import is_hub_source
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import open_records, parse_record
from llavar_peft.recipe.data_sources import columns_of, paths_of, sources_of
from llavar_peft.recipe.validate import recipe_from_mapping
from llavar_peft.training.stage_records import check_data_paths
from tests.recipe.test_validation import MAPPING, STAGE

PAGE = Path(llavar_peft.__file__).parents[1] / "docs/formats.md"
TOTAL = ("What is the total?", "23.80")
FIELDS = '{"menu":[{"nm":"TEA","price":"2.00"}],"total":{"total_price":"23.80"}}'
EXPECTED = {
    "conversations.json": [[TOTAL]],
    "messages.jsonl": [[TOTAL], [("Which color?", "Red.")]],
    "receipts.csv": [[TOTAL], [("What is the date,\nas printed?", "14 March 2024")]],
    "questions.json": [[("Which shop?", "LIDL")], [TOTAL], [("Which shop?", "Lidl"), ("Which day?", "14 March")]],
    "fields.jsonl": [[("Return the fields of this image as JSON.", FIELDS)]],
    "texts.jsonl": [[TOTAL, ("And the date?", "14 March 2024")]],
    "receipts.parquet": [[TOTAL]],
    "saved": [[TOTAL]],
    "released.json": [[TOTAL]],
}
"""The questions and answers of the page's examples."""


@pytest.mark.skipif(not PAGE.is_file(), reason="needs the repository")
def test_the_examples_of_the_formats_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("receipts/2024").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save("receipts/2024/0001.jpg")
    recipes = []
    for kind, title, body in re.findall(r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```$', PAGE.read_text(), re.M | re.S):
        if title:
            Path(title).write_text(body)
        elif kind == "python":
            exec(compile(body, str(PAGE), "exec"), {})
        elif kind == "yaml":
            recipes.append(yaml.safe_load(body))
        else:
            assert kind == "bash"
            assert main(shlex.split(body)[1:]) == 0, body
    roots = ImageRoots(["receipts", "released"])
    for name, expected in EXPECTED.items():
        store = open_records(name)
        assert check_records(store, roots).clean, name
        found = [parse_record(store[index], store.where(index)) for index in range(len(store))]
        texts = [[turn.text.replace("<image>", "").strip() for turn in one.turns] for one in found]
        assert [list(zip(turns[::2], turns[1::2], strict=True)) for turns in texts] == expected, name
        assert all(len(one.images) == 1 for one in found), name
    assert json.loads(Path("released.json").read_text())[0]["image"] == "0001.jpg"
    assert Path("released/0001.jpg").read_bytes() == Path("receipts/2024/0001.jpg").read_bytes()
    one, hub = (recipe_from_mapping({**MAPPING, "stages": [{**STAGE, **given}]}, "x") for given in recipes)
    check_data_paths(one.stages)
    assert dict(columns_of(sources_of(one.stages[0].data)[0])) == {
        "image": "bild", "question": "frage", "answer": "antwort",
    }  # fmt: skip
    assert all(is_hub_source(*paths_of(source.records)) for source in sources_of(hub.stages[0].data))
