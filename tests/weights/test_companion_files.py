"""What ``merge``, ``delta`` and ``convert`` copy from a checkpoint into a result that may be published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llavar_peft import ModelConfig, apply_delta, build_model, export, make_delta, merge_adapter
from llavar_peft.data.conversation_template import CHAT_TEMPLATE
from llavar_peft.errors import ConfigError
from llavar_peft.recipe.schema import Lora
from llavar_peft.weights.io.companion_files import copy_companion, find_companions
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter

PARTS = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
PRIVATE = "TOP SECRET"
HOSTILE = "{{ ''.__class__ }}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model, processor = build_model(PARTS)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_moved_adapter(folder, ModelConfig(checkpoint=str(checkpoint)), Lora(rank=2, alpha=4.0, dropout=0.0))
    return folder


@pytest.fixture
def hostile(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with files that must not be passed on."""
    folder = tmp_path / "hostile"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(HOSTILE)
    (folder / "notes.txt").write_text(PRIVATE)
    (folder / "credentials.json").write_text(json.dumps({"key": PRIVATE}))
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "LICENSE.txt").write_text("Use it well.")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": HOSTILE}))
    return folder


def _texts(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".txt"))


def test_a_merge_copies_only_what_its_result_needs(hostile: Path, adapter: Path, tmp_path: Path) -> None:
    out = merge_adapter(hostile, adapter, tmp_path / "out", probe=False).out
    names = {path.name for path in out.iterdir()}
    assert names.isdisjoint({"notes.txt", "credentials.json", "modeling.py"})
    assert "LICENSE.txt" in names
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert PRIVATE not in _texts(out)
    assert HOSTILE not in _texts(out)
    build_model(ModelConfig(checkpoint=str(out)))


def _merge(source: Path, adapter: Path, out: Path) -> None:
    merge_adapter(source, adapter, out, probe=False)


def _apply(source: Path, adapter: Path, out: Path) -> None:
    apply_delta(LANGUAGE_MODEL, source, out, force=True)


def _make(source: Path, adapter: Path, out: Path) -> None:
    make_delta(LANGUAGE_MODEL, source, out)


def _convert(source: Path, adapter: Path, out: Path) -> None:
    export(source, out, to="original")


COMMANDS: tuple[Callable[[Path, Path, Path], None], ...] = (_merge, _apply, _make, _convert)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.model"])
def test_a_link_out_of_the_checkpoint_is_refused(
    command: Callable[[Path, Path, Path], None], name: str, hostile: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "private").write_text(json.dumps({"secret": PRIVATE}))
    (hostile / name).unlink(missing_ok=True)
    (hostile / name).symlink_to(tmp_path / "private")
    with pytest.raises(ConfigError, match=rf"{name}: a link out of its folder .to .*private"):
        command(hostile, adapter, tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*out*") if path.is_dir()]


def test_links_within_the_folder_and_into_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text('{"a": 1}')
    (snapshot / "generation_config.json").symlink_to("../../blobs/abc")
    (snapshot / "special_tokens_map.json").symlink_to("generation_config.json")
    (tmp_path / "linked").symlink_to(snapshot)
    (tmp_path / "out").mkdir()
    for path in find_companions(tmp_path / "linked"):
        copy_companion(path, tmp_path / "out")
    copied = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in copied] == ["generation_config.json", "special_tokens_map.json"]
    assert not any(path.is_symlink() for path in copied)
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "models--a--b/refs")
    (tmp_path / "models--a--b/refs").write_text("{}")
    with pytest.raises(ConfigError, match="a link out of its folder"):
        find_companions(snapshot)


def test_code_is_not_passed_on(tmp_path: Path) -> None:
    """``find_companions`` refuses code where a library looks for it; elsewhere the key is left out."""
    (tmp_path / "special_tokens_map.json").write_text('{"auto_map": {"A": "evil.A"}, "pad_token": "<unk>"}')
    (path,) = find_companions(tmp_path)
    (tmp_path / "out").mkdir()
    copy_companion(path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / path.name).read_text()) == {"pad_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.A", null]}}')
    with pytest.raises(ConfigError, match=r"tokenizer_config.json:auto_map"):
        find_companions(tmp_path)
