"""Checkpoints from anyone: their code never runs, and damaged settings raise this package's errors only."""

from __future__ import annotations

import io
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavar_peft import ModelConfig, build_model, cli
from llavar_peft.errors import ConfigError, LlavarError
from llavar_peft.models.build_model import expected_shapes, load_processor
from llavar_peft.models.checkpoint_loading import read_checkpoint

PARTS = Path(str(files("llavar_peft") / "assets/tiny"))
SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json")
CODE = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoProcessor": "evil.Evil"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrusted") / "model"
    parts = ModelConfig(
        language_model=str(PARTS / "language_model"), vision_tower=str(PARTS / "vision_tower"), dtype="float32"
    )
    model, processor = build_model(parts)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _plant(folder: Path, name: str, key: str, value: Any) -> Path:
    """Name code in a file of settings, and write code that leaves a trace."""
    path = folder / name
    stored = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**stored, key: value}))
    trace = folder / "it-ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n")
    return trace


@pytest.mark.parametrize("name", [*SETTINGS, "generation_config.json", "preprocessor_config.json"])
def test_code_of_a_checkpoint_never_runs(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    trace = _plant(folder, name, "auto_map", CODE)
    records = tmp_path / "records.json"
    records.write_text(
        '[{"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]'
    )
    for command in (
        ["ask", "--model", str(folder), "What?"],
        ["data", "inspect", str(records), "--model", str(folder)],
        ["convert", str(folder), str(tmp_path / "out"), "--to", "hf-llava"],
        ["chat", "--model", str(folder)],
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        assert cli.main(command) == 2, command
        assert f"{name}:auto_map: the checkpoint brings code" in " ".join(capsys.readouterr().err.split())
        assert not trace.exists()
        assert not (tmp_path / "out").exists()


def test_kernels_from_the_hub_are_rejected(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    _plant(folder, "config.json", "_attn_implementation", "someone/kernels")
    with pytest.raises(ConfigError, match="someone/kernels"):
        read_checkpoint(ModelConfig(checkpoint=str(folder)))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from((*SETTINGS, "tokenizer.json")), data=st.data())
def test_damaged_settings_raise_only_our_errors(name: str, data: st.DataObject, checkpoint: Path) -> None:
    """Replace one value anywhere in a file, or cut the file."""
    folder = checkpoint.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder)
    text = (folder / name).read_text()
    if data.draw(st.integers(0, 9)) == 0:
        (folder / name).write_text(text[: data.draw(st.integers(0, len(text)))])
    else:
        stored = json.loads(text)
        inner = stored
        while True:
            keys = sorted(inner) if isinstance(inner, dict) else list(range(min(len(inner), 20)))
            key = data.draw(st.sampled_from(keys))
            if isinstance(inner[key], dict | list) and inner[key] and data.draw(st.booleans()):
                inner = inner[key]
                continue
            inner[key] = data.draw(_JSON)
            break
        (folder / name).write_text(json.dumps(stored))
    try:
        parts = read_checkpoint(ModelConfig(checkpoint=str(folder)))
        expected_shapes(parts.config)
        load_processor(str(folder))
    except LlavarError:
        pass
