"""Lengths and letter heights of records before a model is trained on them."""

import json
from pathlib import Path

import pytest

from llavar_peft import cli
from llavar_peft.data.encode_record import encode_record
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import open_records
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.models.build_model import load_processor


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four signs and four documents, all text of each; and a conversation without an image."""
    folder = tmp_path_factory.mktemp("drawn")
    write_synthetic(folder, 8, SynthSettings(kinds=("signs", "documents"), width=512, seed=3), workers=1)
    records = json.loads((folder / "records.json").read_text())
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    (folder / "records.json").write_text(json.dumps([*records, {"id": "talk", "conversations": turns}]))
    return folder


def told(drawn: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    known = ["eval", "diagnose", "--records", str(drawn / "records.json"), "--model", str(checkpoint)]
    assert cli.main([*known, *more]) == 0
    return capsys.readouterr().out


def test_truncation_is_that_of_training(drawn: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processor, roots = load_processor(str(checkpoint)), ImageRoots(drawn / "images")
    records = open_records([str(drawn / "records.json")])
    for max_length in (20, 100, 700, 4000):
        found = json.loads(told(drawn, checkpoint, capsys, "--max-length", str(max_length), "--json"))
        whole = [encode_record(record, processor, 1 << 20, roots=roots) for record in records]
        kept = [encode_record(record, processor, max_length, roots=roots) for record in records]
        cut = [one.dropped for one, other in zip(kept, whole, strict=True) if one.supervised < other.supervised]
        assert (found["every"]["cut"], found["every"]["lost"]) == (len(cut), sum(why is not None for why in cut))
        assert (found["every"]["records"], found["ocr"]["records"]) == (9, 8)
        assert found["every"]["percentiles"]["100"] == max(len(one.input_ids) for one in whole)


def test_text_too_small_to_be_read(drawn: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents of 512 pixels come down to the tiny tower's side; signs stay large."""
    assert "4 of 8 records with known letter height, 50.0 %" in told(drawn, checkpoint, capsys)
    assert "0 of 8 records" in told(drawn, checkpoint, capsys, "--smallest", "0.5")


def test_records_without_letter_heights(
    drawn: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {key: record[key] for key in ("id", "image", "conversations")}
        for record in json.loads((drawn / "records.json").read_text())[:2]
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    assert "the letter height is unknown: the file of records" in told(tmp_path, checkpoint, capsys)


@pytest.mark.parametrize("arguments", [[], ["r.json", "--records", "s.json"], ["--records", "s.json"]])
def test_invalid_options_are_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "diagnose", *arguments]) == 2
    assert "Fix: " in capsys.readouterr().err
