"""Names of models on the hub, and why a download failed."""

from __future__ import annotations

from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.weights.io.hub_folders import download, is_hub_name

REQUEST = httpx.Request("GET", "https://hub")
RESPONSE = httpx.Response(401, request=REQUEST)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lmsys/vicuna-7b-v1.1", True),
        ("vicuna-7b", False),
        ("./lmsys/vicuna", False),
        ("/models/vicuna", False),
        ("~/vicuna", False),
        ("runs/mine/model", False),
        ("known/model", False),
        ("two words/model", False),
    ],
)
def test_hub_names(name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "known").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) == expected


@pytest.mark.parametrize(
    ("error", "offline", "message"),
    [
        (hub_errors.LocalEntryNotFoundError("x"), True, "not in the hub's cache, and HF_HUB_OFFLINE is set"),
        (hub_errors.LocalEntryNotFoundError("x"), False, "the Hugging Face hub cannot be reached"),
        (hub_errors.RepositoryNotFoundError("x", response=RESPONSE), False, "the hub has no public model of this name"),
        (hub_errors.GatedRepoError("x", response=RESPONSE), False, "the model on the hub needs a permission"),
        (OSError("line one\nline two"), False, "the download from the Hugging Face hub failed (line one)"),
        (OSError("x" * 5000), False, "failed (xxx"),
    ],
)
def test_a_failed_download_is_explained_in_one_line(
    error: Exception, offline: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(EnvironmentFaultError) as caught:
        download("owner/model", "model")
    text = str(caught.value)
    assert message in text
    assert text.startswith("model: no such folder, and ")
    assert len(text) < 400
    assert "\n" not in text
