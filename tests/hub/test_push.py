"""Publish on a hub and use what was published by its name, through the hub's own client and the command line."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from llavar_peft import Lora, ModelConfig, build_model, cli, make_delta
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from tests.commands import call
from tests.hub.hub_server import READER, STRANGER, UNLUCKY, WRITER, Hub, run_hub
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter

_CARD = """\
---
library_name: peft
base_model: base
tags: [lora, "base_model:adapter:base"]
---

# tune

- checkpoint `base`

    llavar-peft adapter verify this/folder --base base

It has "base" and a basement.
"""
_ADAPTER_RECIPE = """\
# Trained by stage: tune
model: {{checkpoint: {root}/base}}
stages:
- name: tune
  data:
    records: hf://me/records
"""
_RECIPE = """\
model: {{checkpoint: {root}/base}}
output_dir: {root}/trained
stages:
- name: tune
  tune: {{type: lora}}
  data: {{records: {root}/data/records.json, images: {root}/data/images}}
  optim: {{learning_rate: 1e-3}}
  global_batch_size: 1
  micro_batch_size: 1
"""


@dataclass(frozen=True)
class Result:
    """What a command printed."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it, a delta, and records with images."""
    root = tmp_path_factory.mktemp("hub")
    parts = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float16")
    model, processor = build_model(parts)
    model.save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    base = ModelConfig(checkpoint=str(root / "base"), dtype="float32")
    save_moved_adapter(root / "run/adapter", base, Lora(rank=4, alpha=8, dropout=0.0))
    make_delta(LANGUAGE_MODEL, root / "base", root / "delta")
    write_synthetic(root / "data", 3, SynthSettings(style="plain", seed=7, task="question"))
    (root / "run/adapter/README.md").write_text(_CARD)
    (root / "run/adapter/recipe.yaml").write_text(_ADAPTER_RECIPE.format(root=root))
    shutil.copytree(root / "run/adapter", root / "moved")
    base_file = root / "moved/base.json"
    base_file.write_text(json.dumps({**json.loads(base_file.read_text()), "checkpoint": "runs/base"}))
    (root / "run.yaml").write_text(_RECIPE.format(root=root))
    return root


@dataclass(frozen=True)
class Session:
    """The commands that were run, by their name, and the hub afterwards."""

    hub: Hub
    results: dict[str, Result]

    def card(self, name: str, kind: str = "model") -> tuple[dict[str, object], str]:
        """Return the fields and the text of a repository's card."""
        _, head, text = self.hub.repositories[f"{kind}:{name}"].files["README.md"].decode().split("---\n", 2)
        return yaml.safe_load(head), text


@pytest.fixture(scope="module")
def session(folders: Path) -> Iterator[Session]:
    """Run all commands in one process, whose imports they share."""
    base, adapter, delta = str(folders / "base"), str(folders / "run"), str(folders / "delta")
    ask = ["--image", str(next((folders / "data/images").iterdir())), "--greedy", "--max-new-tokens", "6", "What?"]
    named = ["--base-name", "me/base"]
    commands: dict[str, tuple[str | None, list[str]]] = {
        "no token": (None, ["push", base, "me/base", "--base-name", "me/llama"]),
        "read only": (READER, ["push", base, "me/base", "--base-name", "me/llama"]),
        "wrong token": ("hf_wrong", ["push", base, "me/base", "--base-name", "me/llama"]),
        "no owner": (WRITER, ["push", base, "base", "--base-name", "me/llama"]),
        "odd name": (WRITER, ["push", base, "me/ba..se", "--base-name", "me/llama"]),
        "another owner": (WRITER, ["push", base, "seen/base", "--base-name", "me/llama"]),
        "forbidden": (STRANGER, ["push", base, "me/forbidden", "--base-name", "me/llama"]),
        "no base name": (WRITER, ["push", base, "me/base"]),
        "odd base name": (WRITER, ["push", base, "me/base", "--base-name", "llama"]),
        "too many base names": (WRITER, ["push", base, "me/base", "--base-name", "me/a", "--base-name", "me/b"]),
        "no folder": (WRITER, ["push", str(folders / "nothing"), "me/base"]),
        "no base of an adapter": (WRITER, ["push", adapter, "me/adapter"]),
        "a path like a name": (WRITER, ["push", str(folders / "moved"), "me/moved"]),
        "train without token": (None, ["train", str(folders / "run.yaml"), "--push", "me/new", *named]),
        "train without base": (WRITER, ["train", str(folders / "run.yaml"), "--push", "me/new"]),
        "private without push": (WRITER, ["convert", base, str(folders / "x"), "--to", "llavar", "--private"]),
        "base": (WRITER, ["push", base, "me/base", "--base-name", "me/llama"]),
        "fails": (UNLUCKY, ["push", adapter, "me/adapter", "--private", *named]),
        "adapter": (WRITER, ["push", adapter, "me/adapter", "--private", *named]),
        "again": (WRITER, ["push", adapter, "me/adapter", "--private", *named]),
        "public": (WRITER, ["push", base, "me/base", "--base-name", "me/llama", "--private", "--replace"]),
        "delta": (WRITER, ["push", delta, "team/delta", "--base-name", "me/llama"]),
        "records": (WRITER, ["push", str(folders / "data"), "me/records", "--images", str(folders / "data/images")]),
        "verify": (WRITER, ["adapter", "verify", "me/adapter", "--base", "me/base"]),
        "ask": (WRITER, ["ask", "--model", "me/adapter", *ask]),
        "ask local": (None, ["ask", "--model", adapter, *ask]),
        "merge": (
            WRITER,
            ["merge", "--base", "me/base", "--adapter", "me/adapter", "--out", str(folders / "merged"), "--no-probe",
             "--push", "me/merged"],
        ),
        "verify delta": (WRITER, ["delta", "verify", "--base", str(LANGUAGE_MODEL), "--delta", "team/delta"]),
        "check": (WRITER, ["data", "check", "hf://me/records"]),
        "replace": (WRITER, ["push", delta, "me/merged", "--base-name", "me/llama", "--replace"]),
    }  # fmt: skip
    with run_hub() as hub:
        environment = {"HF_HOME": str(folders / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        done = call(_run_commands, (environment, list(commands.values())), folders)
        assert done.status == 0, done.stderr[-3000:]
        results = json.loads(done.stdout.splitlines()[-1])
        yield Session(hub, {name: Result(*one) for name, one in zip(commands, results, strict=True)})


def _run_commands(given: tuple[dict[str, str], list[tuple[str | None, list[str]]]]) -> None:
    """Run commands, each with its token, in a process that was forked after the hub's client was imported."""
    os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ |= given[0]
    import datasets.config
    import huggingface_hub.constants

    importlib.reload(huggingface_hub.constants)  # which read the environment
    importlib.reload(datasets.config)
    done: list[tuple[int, str, str]] = []
    for token, arguments in given[1]:
        os.environ.pop("HF_TOKEN", None)
        os.environ |= {"HF_TOKEN": token} if token else {}
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(arguments)
        done.append((status, out.getvalue(), err.getvalue()))
    sys.stdout.write(json.dumps(done) + "\n")


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("no token", 3, "me/base: there is no token for the Hugging Face hub. Fix: run `hf auth login`"),
        ("read only", 3, "the token for the Hugging Face hub may only read. Fix: run `hf auth login` with a token"),
        ("wrong token", 3, "the hub does not accept the token"),
        ("no owner", 2, "--push: no name of a repository (got 'base', expected OWNER/NAME)"),
        ("odd name", 2, "--push: no name of a repository (got 'me/ba..se'"),
        ("another owner", 3, "the token may not write for 'seen' (expected one of me, team)"),
        ("forbidden", 3, "not pushed, and nothing of it is visible"),
        ("no base name", 2, "nothing in the folder says which model it was made from"),
        ("odd base name", 2, "--base-name: no name on the hub (got 'llama')"),
        ("too many base names", 2, "--base-name: more names than bases (got 'me/b' too)"),
        ("no folder", 2, "no such folder. Fix: give the folder that was written"),
        ("no base of an adapter", 2, "its card has to name the base by its name on the hub"),
        ("a path like a name", 2, "its card would name the base 'runs/base', and the hub has no model of this name"),
        ("train without token", 3, "there is no token"),
        ("train without base", 2, "add --base-name OWNER/NAME"),
        ("private without push", 2, "--private: applies only with --push"),
        ("fails", 3, "push it again: `llavar-peft push"),
        ("again", 2, "me/adapter: exists already with other contents (README.md, adapter_config.json"),
        ("public", 2, "me/base: exists and is public, expected a private repository"),
    ],
)
def test_what_cannot_be_pushed_is_named(command: str, status: int, message: str, session: Session) -> None:
    result = session.results[command]
    assert (result.status, message in result.stderr) == (status, True), result


def test_nothing_is_half_pushed_and_nothing_is_trained_first(session: Session, folders: Path) -> None:
    assert not (folders / "trained").exists()
    assert not (folders / "x").exists()
    assert session.hub.repositories["model:me/forbidden"].files == {}
    assert "model:me/moved" not in session.hub.repositories
    assert all("Upload with llavar-peft" in one for repo in session.hub.repositories.values() for one in repo.commits)
    assert len(session.hub.repositories["model:me/adapter"].commits) == 1
    assert "--private --base-name me/base`" in session.results["fails"].stderr


def test_an_adapter_is_used_by_its_name(session: Session) -> None:
    verified = session.results["verify"]
    assert (verified.status, "matches by its fingerprint" in verified.stdout) == (0, True), verified
    assert session.results["ask"].status == 0, session.results["ask"]
    assert session.results["ask"].stdout == session.results["ask local"].stdout


def test_what_is_published_names_no_path_of_this_machine(session: Session, folders: Path) -> None:
    for repository in session.hub.repositories.values():
        for path, data in repository.files.items():
            if not path.endswith((".safetensors", ".bin")):
                assert str(folders).encode() not in data, path
    files = session.hub.repositories["model:me/adapter"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert json.loads(files["base.json"])["checkpoint"] == "me/base"
    assert files["recipe.yaml"].startswith(b"# Trained by stage: tune\n")
    assert yaml.safe_load(files["recipe.yaml"])["model"]["checkpoint"] == "me/base"
    local = json.loads((folders / "run/adapter/base.json").read_text())
    assert local["checkpoint"] == str(folders / "base")
    assert session.hub.repositories["model:me/adapter"].private


def test_the_card_of_an_adapter(session: Session) -> None:
    fields, text = session.card("me/adapter")
    assert (fields["base_model"], fields["base_model_relation"]) == ("me/base", "adapter")
    assert (fields["datasets"], fields["tags"]) == (["me/records"], ["lora"])
    assert "- checkpoint `me/base`" in text
    assert "llavar-peft adapter verify me/adapter --base me/base\n" in text
    assert 'It has "me/base" and a basement.' in text
    assert "llavar-peft merge --base me/base --adapter me/adapter --out merged" in text
    assert "vllm serve exported" in text


def test_a_merge_of_names_is_published(session: Session, folders: Path) -> None:
    assert session.results["merge"].status == 0, session.results["merge"]
    assert f"{session.hub.url}/me/merged/commit/" in session.results["merge"].stdout
    assert (folders / "merged/model.safetensors").is_file()
    assert "- base `me/base`\n- adapter `me/adapter`" in (folders / "merged/README.md").read_text()


def test_a_delta_is_used_by_its_name_and_replaces_other_contents(session: Session) -> None:
    assert session.results["verify delta"].status == 0, session.results["verify delta"]
    assert session.results["replace"].status == 0, session.results["replace"]
    replaced, delta = (session.hub.repositories[f"model:{name}"] for name in ("me/merged", "team/delta"))
    assert replaced.files.keys() == delta.files.keys()
    assert len(replaced.commits) == 2
    assert "delta apply --base BASE --delta team/delta" in session.card("team/delta")[1]


def test_records_are_read_back(session: Session) -> None:
    checked = session.results["check"]
    assert (checked.status, "3 records, 0 faults" in checked.stdout) == (0, True), checked
    fields, text = session.card("me/records", "dataset")
    assert fields["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert "3 records with 3 images" in text
