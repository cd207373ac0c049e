"""Checkpoints from anyone: their code never runs. ``tests/fuzz`` damages their files."""

from __future__ import annotations

import ast
import io
import json
import shutil
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavar_peft import Lora, ModelConfig, build_model, cli
from llavar_peft.errors import ConfigError
from llavar_peft.models.checkpoint_loading import read_checkpoint
from tests.weights.adapters import save_moved_adapter

PARTS = Path(str(files("llavar_peft") / "assets/tiny"))
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


FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_NEEDS_FASTAPI = pytest.mark.skipif(
    find_spec("fastapi") is None, reason="the extra serve is not installed, which is said before anything is opened"
)
_PLACES = {
    "ask": "ask --model {m} What?",
    "chat": "chat --model {m}",
    "serve": "serve --model {m} --port 0",
    "generate": "generate --model {m} --questions q.jsonl --answers a.jsonl --images .",
    "inspect": "data inspect r.json --model {m}",
    "train": "train recipe.yaml model.checkpoint={m}",
    "dry run": "train recipe.yaml model.checkpoint={m} --dry-run",
    "estimate": "estimate recipe.yaml model.checkpoint={m}",
    "merge": "merge --base {m} --adapter adapter --out out",
    "verify": "adapter verify adapter --base {m}",
    "hf-llava": "convert {m} out --to hf-llava",
    "original": "convert {m} out --to original",
    "delta make": "delta make --base {m} --target {m} --out out",
    "delta target": "delta make --base language_model --target {m} --out out",
    "delta apply": "delta apply --base {m} --delta {m} --out out",
    "delta verify": "delta verify --base {m} --delta {m}",
    "vqa": "eval vqa --dataset v.json --model {m} --out x.json",
    "mme": "eval mme --folder mme --model {m}",
    "answer": "eval answer --questions q.jsonl --images . --model {m} --out x.jsonl",
    "diagnose": "eval diagnose --records r.json --model {m}",
}
"""Every command that opens a model, by the part of it that is {m}."""


def _write_inputs(folder: Path, checkpoint: Path) -> None:
    """Write what the commands need besides a model."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (folder / "r.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    (folder / "q.jsonl").write_text('{"question_id": 1, "text": "What?", "category": "conv", "image": "a.png"}\n')
    (folder / "v.json").write_text(json.dumps([{"question": "What?", "image": "a.png", "answers": ["A"]}]))
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    (folder / "mme" / "OCR").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(folder / "mme/OCR/a.png")
    (folder / "mme/OCR/a.txt").write_text("Is it red? Please answer yes or no.\tYes\nIs it blue?\tNo\n")
    stage = {
        "name": "s", "tune": "projector", "data": {"records": "r.json", "workers": 0}, "precision": "fp32",
        "optim": {"learning_rate": 1e-3}, "global_batch_size": 1, "micro_batch_size": 1, "max_steps": 1,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps({"stages": [stage], "output_dir": "run"}))
    (folder / "language_model").symlink_to(PARTS / "language_model")
    save_moved_adapter(
        folder / "adapter", ModelConfig(checkpoint=str(checkpoint), dtype="float32"), Lora(rank=2, alpha=2)
    )


@pytest.fixture(scope="module")
def inputs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    _write_inputs(folder, checkpoint)
    return folder


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=_NEEDS_FASTAPI) if place == "serve" else place for place in _PLACES]
)
def test_code_of_a_checkpoint_never_runs(
    place: str, checkpoint: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each command refuses code in each file that can name some, whatever is typed."""
    monkeypatch.chdir(inputs)
    for name in FILES:
        shutil.rmtree(".a.jsonl.parts", ignore_errors=True)
        folder = shutil.copytree(checkpoint, tmp_path / name)
        trace = _plant(folder, name, "auto_map", CODE)
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        command = [word.format(m=folder) for word in _PLACES[place].split()]
        assert cli.main(command) == 2, command
        assert f"{name}:auto_map: the checkpoint brings code" in " ".join(capsys.readouterr().err.split())
        assert not trace.exists()
        assert not Path("out").exists()


def test_code_of_an_adapter_never_runs(
    checkpoint: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft would import the module that ``auto_mapping`` names."""
    folder = shutil.copytree(inputs / "adapter", tmp_path / "adapter")
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    trace = _plant(folder, "adapter_config.json", "auto_mapping", mapping)
    monkeypatch.syspath_prepend(str(folder))
    model = str(checkpoint)
    for command in (
        ["adapter", "show", str(folder)],
        ["adapter", "verify", str(folder), "--base", model],
        ["merge", "--base", model, "--adapter", str(folder), "--out", str(tmp_path / "out"), "--no-probe"],
        ["ask", "--model", model, "--adapter", str(folder), "--max-new-tokens", "1", "What?"],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
        assert not trace.exists()


def test_every_loader_is_told_to_run_no_code() -> None:
    """Loaders that take ``trust_remote_code`` ask the user, or follow a default, if it is not passed."""
    package, found = Path(str(files("llavar_peft"))), 0
    for path in package.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr in ("from_pretrained", "from_config", "pipeline", "load_dataset"):
                found += 1
                passed = {key.arg: ast.unparse(key.value) for key in call.keywords}
                assert passed.get("trust_remote_code") == "False", f"{path.name}:{call.lineno}"
    assert found >= 3


def test_kernels_from_the_hub_are_rejected(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    _plant(folder, "config.json", "_attn_implementation", "someone/kernels")
    with pytest.raises(ConfigError, match="someone/kernels"):
        read_checkpoint(ModelConfig(checkpoint=str(folder)))
