"""Missing packages are named with the command that installs them, before any model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from llavar_peft import cli
from llavar_peft.evaluation.vqa import caption_metrics

STAGE = {
    "name": "a",
    "data": {"records": "r.json", "images": "."},
    "tune": "full",
    "global_batch_size": 2,
    "micro_batch_size": 1,
}
MODEL = {"language_model": "/nonexistent", "vision_tower": "/nonexistent", "dtype": "bfloat16"}
JUDGE = ["eval", "judge"] + [part for name in ("questions", "contexts", "rules", "reference", "answers", "out")
                             for part in (f"--{name}", "nowhere")]  # fmt: skip


def _block(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package missing, also for modules of this project that were imported before."""
    for name in list(sys.modules):
        if name == package or name.startswith((f"{package}.", "llavar_peft.serving.", "llavar_peft.compat.server")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    ("package", "arguments", "fix"),
    [
        ("gradio", ["serve", "--model", "/nonexistent", "--port", "0", "--ui"], "pip install 'llavar-peft[serve]'"),
        ("uvicorn", ["serve", "--model", "/nonexistent", "--port", "0"], "pip install 'llavar-peft[serve]'"),
        ("fastapi", ["serve", "--model", "/nonexistent", "--port", "0", "--ui"], "pip install 'llavar-peft[serve]'"),
        ("rapidocr", ["ocr", "build", ".", "--out", "o.json"], "pip install 'llavar-peft[ocr]'"),
        ("onnxruntime", ["ocr", "build", ".", "--out", "o.json"], "pip install 'llavar-peft[ocr]'"),
        (
            "nltk",
            ["eval", "vqa", "--dataset", "nowhere", "--model", "/nonexistent", "--metric", "cider"],
            "pip install 'llavar-peft[eval]'",
        ),
        ("openai", JUDGE, "pip install 'llavar-peft[eval]'"),
    ],
)
def test_a_command_names_the_missing_package(
    package: str, arguments: list[str], fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    _block(package, monkeypatch)
    caption_metrics._nltk.cache_clear()
    assert cli.main(arguments) == 3
    told = capsys.readouterr().err
    assert package in told
    assert f"Fix: {fix}" in told


@pytest.mark.parametrize(
    ("package", "changes", "fix"),
    [
        ("bitsandbytes", {"optim": {"optimizer": "adamw_8bit"}}, "pip install bitsandbytes, or use adamw"),
        ("tensorboard", {"report_to": ["tensorboard"]}, "pip install tensorboard"),
        ("wandb", {"report_to": ["wandb"]}, "pip install wandb"),
        ("deepspeed", {}, "pip install 'llavar-peft[deepspeed]'"),
    ],
)
def test_training_names_the_missing_package(
    package: str, changes: dict[str, object], fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    optim = {"learning_rate": 1e-3, **dict(changes.pop("optim", {}))}  # type: ignore[call-overload]
    recipe = {"model": MODEL, "stages": [{**STAGE, "optim": optim}], "output_dir": str(tmp_path / "out"), **changes}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "r.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(package == "deepspeed").lower())
    _block(package, monkeypatch)
    assert cli.main(["train", "recipe.yaml"]) == 3
    told = capsys.readouterr().err
    assert package in told.lower()
    assert f"Fix: {fix}" in told
    assert not (tmp_path / "out").exists()
