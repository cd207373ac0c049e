"""What is pushed of a folder: which files, and the names that replace paths of this machine in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from llavar_peft.constants import MODEL_TYPE, RESOLVED_RECIPE_FILE
from llavar_peft.errors import DAMAGED, ConfigError
from llavar_peft.hub.hub_access import is_repository_name
from llavar_peft.types import expand_home
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, BASE_FILE, read_base_settings, read_settings
from llavar_peft.weights.delta.released_layout import is_delta, read_model_config, view_as_released
from llavar_peft.weights.io.companion_files import check_link
from llavar_peft.weights.io.quantized_weights import QUANTIZATION
from llavar_peft.weights.io.tensor_table import read_tensor_table
from llavar_peft.weights.io.weights_card import CARD_FILE, portable_name

Kind = Literal["adapter", "model", "quantized", "delta", "dataset"]
_NORM = "model.norm.weight"
_REWRITTEN = (ADAPTER_CONFIG, BASE_FILE, RESOLVED_RECIPE_FILE, "merge.json")
"""Files that may name paths of this machine."""
_RECORDS = (".json", ".jsonl", ".parquet")
_SKIPPED = (".lock", ".part", ".tmp")


@dataclass(frozen=True, slots=True)
class Contents:
    """A folder to be pushed.

    Attributes:
        kind: What it holds.
        folder: The folder; of a data set the file of its records.
        bases: What the settings name as the base, and what else the model was built from; the first is the base.
        config: Its ``config.json``; empty for a data set.
    """

    kind: Kind
    folder: Path
    bases: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None


def open_contents(source: str | Path) -> Contents:
    """Find out what a path holds.

    Args:
        source: A folder of a model, an adapter, a delta or a run; or a file of records, or a folder with one.

    Raises:
        ConfigError: It holds none of these.
        WeightsError: Weights are missing or damaged.
    """
    path = expand_home(source)
    if path.is_file() and path.suffix.lower() in _RECORDS:
        return Contents("dataset", path)
    folder = path
    if not (path / "config.json").is_file():
        folder = next((path / name for name in ("model", "adapter") if (path / name / "config.json").is_file()), path)
    if (folder / ADAPTER_CONFIG).is_file():
        read_settings(folder)
        read_tensor_table(folder / "adapter_model.safetensors")
        return Contents("adapter", folder, tuple(_bases_of_adapter(folder)), {})
    if (folder / "records.json").is_file():
        return Contents("dataset", folder / "records.json")
    if not (folder / "config.json").is_file():
        what = "no such folder" if not path.exists() else "neither a model, an adapter, a delta nor records"
        raise ConfigError.at(str(source), what, "give the folder that was written, or a file of records")
    config = read_model_config(folder)
    read_tensor_table(folder)
    kind: Kind = "quantized" if QUANTIZATION in config else "model"
    if kind == "model" and config.get("model_type") != MODEL_TYPE:
        view = view_as_released(folder)
        kind = "delta" if is_delta(view.table.get(_NORM), folder, view.config) else kind
    return Contents(kind, folder, tuple(_bases_of_model(folder)), config)


def _bases_of_adapter(folder: Path) -> Iterator[str]:
    fields = read_base_settings(folder).fields
    named = [fields.get(key) for key in ("checkpoint", "language_model")]
    base = next((str(one) for one in named if one), read_settings(folder).get("base_model_name_or_path"))
    if base:
        yield str(base)
    if fields.get("vision_tower"):
        yield str(fields["vision_tower"])


def _bases_of_model(folder: Path) -> Iterator[str]:
    card = folder / CARD_FILE
    if card.is_file():
        stated = read_front_matter(card.read_text(encoding="utf-8")).get("base_model")
        yield from ([stated] if isinstance(stated, str) else [str(one) for one in stated or ()])
        return
    try:
        recipe = yaml.safe_load((folder.parent / RESOLVED_RECIPE_FILE).read_text(encoding="utf-8"))["model"]
        yield from (str(recipe[key]) for key in ("checkpoint", "language_model", "vision_tower") if recipe.get(key))
    except (*DAMAGED, yaml.YAMLError):
        return


def read_front_matter(card: str) -> dict[str, Any]:
    """Return the fields at the beginning of a card; none if it has none that can be read."""
    if not card.startswith("---\n"):
        return {}
    try:
        fields = yaml.safe_load(card.split("---\n", 2)[1])
    except yaml.YAMLError:
        return {}
    return fields if isinstance(fields, dict) else {}


def hub_names(contents: Contents, given: Sequence[str]) -> dict[str, str]:
    """Return the hub name of each base by what the settings call it.

    Args:
        contents: The folder.
        given: Names for those that have none, in order.

    Raises:
        ConfigError: A base has no name on the hub, which its card has to state; or there are more names than bases.
    """
    names: dict[str, str] = {}
    left = list(given)
    for source in contents.bases:
        known = portable_name(source)
        if not is_repository_name(known):
            known = left.pop(0) if left else ""
        if not known:
            raise ConfigError.at(
                str(contents.folder),
                f"its card has to name the base by its name on the hub, and {source!r} is none",
                "add --base-name OWNER/NAME, once for each base that is a folder; push the base first if it is not "
                "on the hub",
            )
        names[source] = known
    if not contents.bases and contents.kind != "dataset":
        if not left:
            what = "nothing in the folder says which model it was made from, and a card has to"
            raise ConfigError.at(str(contents.folder), what, "add --base-name OWNER/NAME")
        names[""] = left.pop(0)
    odd = [name for name in given if not is_repository_name(name)]
    if odd or left:
        what = f"no name on the hub (got {odd[0]!r})" if odd else f"more names than bases (got {left[0]!r} too)"
        raise ConfigError.at("--base-name", what, "give one OWNER/NAME for each base that is a folder")
    return names


def collect_files(contents: Contents, names: Mapping[str, str]) -> dict[str, Path | bytes]:
    """Return what is pushed by its path in the repository: files as they are, and texts without paths of this machine.

    Raises:
        ConfigError: A file is a link out of the folder.
    """
    folder = contents.folder
    found: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts) or path.suffix in _SKIPPED:
            continue
        check_link(path, folder)
        found[inside.as_posix()] = _rewrite(path, names) if inside.as_posix() in _REWRITTEN else path
    return found


def _rewrite(path: Path, names: Mapping[str, str]) -> bytes:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return (json.dumps(_portable(json.loads(text), names), indent=2, ensure_ascii=False) + "\n").encode()
    first, _, _ = text.partition("\n")
    comment = f"{first}\n" if first.startswith("#") else ""
    dumped = yaml.safe_dump(_portable(yaml.safe_load(text), names), sort_keys=False, allow_unicode=True)
    return (comment + dumped).encode()


def _portable(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _portable(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [_portable(one, names) for one in value]
    if isinstance(value, str) and value in names:
        return names[value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~")):
        own = portable_name(value)
        return next((hub for source, hub in names.items() if portable_name(source) == own), own)
    return value
