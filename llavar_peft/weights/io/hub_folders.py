"""The folders that settings name: on this disk, or of the Hugging Face hub, from which they are downloaded."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from llavar_peft.errors import ConfigError, EnvironmentFaultError
from llavar_peft.types import expand_home

_FILES = [
    "*.json", "*.safetensors", "*.bin", "*.jinja", "tokenizer.model", "merges.txt", "README.md", "recipe.yaml",
]  # fmt: skip
_LONGEST_REASON = 200  # characters of another library's message


def is_hub_name(name: str) -> bool:
    """Return whether a name that is no folder on this disk can be that of a model on the Hugging Face hub."""
    path = expand_home(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir() or path.exists()
    return not looks_local and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def cached_folder(name: str) -> Path | None:
    """Return the folder of the hub's cache that holds a model's ``config.json``, or None, without the network."""
    if not is_hub_name(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def download(name: str, setting: str) -> Path:
    """Return the folder of the hub's cache that holds a model, which is downloaded if it is not there.

    Args:
        name: ``owner/model``.
        setting: The setting that names the model, for the message.

    Raises:
        EnvironmentFaultError: The hub cannot be reached, or does not have the model.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the hub's client passes on any error of its transport
        reason, fix = _why_not_downloaded(error)
        raise EnvironmentFaultError.at(setting, f"no such folder, and {reason} (got {name!r})", fix) from error


def _why_not_downloaded(error: Exception) -> tuple[str, str]:
    """Return why a model could not be downloaded from the hub, and the fix."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "the model on the hub needs a permission", "request it on the model's page, and run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no public model of this name", "check the name, or run `hf auth login` for a private one"
    if isinstance(error, LocalEntryNotFoundError):
        if HF_HUB_OFFLINE:
            return (
                "not in the hub's cache, and HF_HUB_OFFLINE is set",
                "give a folder, or unset HF_HUB_OFFLINE",
            )
        return "the Hugging Face hub cannot be reached", "give a folder, or check the connection"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST_REASON]
    return f"the download from the Hugging Face hub failed ({reason})", "give a folder, or try again"


def resolve_folder(name: str, setting: str) -> Path:
    """Return the folder that a setting names, downloaded from the Hugging Face hub if it is not on this disk.

    Args:
        name: A path, or a hub name ``owner/model`` where no such path exists.
        setting: The setting's path, for the message.

    Raises:
        ConfigError: There is no such folder.
        EnvironmentFaultError: The hub cannot be reached, or does not have the model.
    """
    path = expand_home(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise ConfigError.at(setting, f"a file, expected a folder (got {name!r})", _fix_for_file(path))
    if ":/" in name:
        fix = "download the model, and give its folder; or give its hub name, owner/model"
        raise ConfigError.at(setting, f"a URL, expected a folder (got {name!r})", fix)
    if not is_hub_name(name):
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.75)
        hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "give a folder, or a hub name owner/model"
        raise ConfigError.at(setting, f"no such folder (got {name!r})", hint)
    return download(name, setting)


def find_folder(name: str | Path, setting: str) -> Path:
    """Return the folder of a path, whether it exists or not; a hub name is downloaded.

    It is for callers that say better than ``resolve_folder`` what they expect in a folder that does not exist.

    Args:
        name: A path, or a hub name ``owner/model`` where no such path exists.
        setting: The setting's path, for the message.

    Raises:
        EnvironmentFaultError: The hub cannot be reached, or does not have the model.
    """
    return download(str(name), setting) if is_hub_name(str(name)) else expand_home(name)


def _fix_for_file(path: Path) -> str:
    if path.name.startswith("mm_projector"):
        return "this is a stage-1 projector: set model.projector to it, and language_model and vision_tower"
    if path.suffix == ".gguf":
        return "GGUF files are not supported: give the folder of the model that the file was converted from"
    if (path.parent / "config.json").is_file():
        return f"give the folder of the model, {str(path.parent)!r}"
    return "give the folder that contains config.json and the weights"
