"""What a folder that is to be pushed holds, what it was made from, and the names that this has on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from llavar_peft.constants import MODEL_TYPE, RESOLVED_RECIPE_FILE
from llavar_peft.errors import DAMAGED, ConfigError
from llavar_peft.hub.hub_access import is_repository_name
from llavar_peft.text_files import read_text
from llavar_peft.types import expand_home
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, read_base_settings, read_settings
from llavar_peft.weights.delta.released_layout import is_delta, is_language_model, read_model_config, view_as_released
from llavar_peft.weights.io.quantized_weights import QUANTIZATION
from llavar_peft.weights.io.tensor_table import read_tensor_table
from llavar_peft.weights.io.weights_card import CARD_FILE, portable_name

Kind = Literal["adapter", "model", "quantized", "delta", "dataset"]
_NORM = "model.norm.weight"
_RECORDS = (".json", ".jsonl", ".parquet")
_FRONT_MATTER = re.compile(r"---\n(.*?)^---[ \t]*(?:\n|\Z)(.*)", re.DOTALL | re.MULTILINE)


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
    if kind == "model" and is_language_model(config):
        what = f"a {str(config.get('model_type'))[:80]!r}, expected a LLaVAR"
        fix = "give the folder of a model that sees images; `hf upload` publishes any folder"
        raise ConfigError.at(str(source), what, fix)
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
        yield from texts_of(split_card(read_text(card, error=ConfigError))[0].get("base_model"))
        return
    try:
        recipe = yaml.safe_load((folder.parent / RESOLVED_RECIPE_FILE).read_text(encoding="utf-8"))["model"]
        yield from (str(recipe[key]) for key in ("checkpoint", "language_model", "vision_tower") if recipe.get(key))
    except (*DAMAGED, yaml.YAMLError):
        return


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Return the fields at the beginning of a card, none if they cannot be read, and the text after them."""
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}, card
    try:
        fields = yaml.safe_load(found[1])
    except (*DAMAGED, yaml.YAMLError):
        fields = None
    return (fields, found[2]) if isinstance(fields, dict) else ({}, found[2])


def texts_of(value: Any) -> list[str]:
    """Return a field of a card or a recipe that is a text or a list of texts as a list; other values are left out."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


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
