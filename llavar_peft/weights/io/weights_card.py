"""The model card (``README.md``) of a folder of weights that was computed from others.

Source of the format: huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llavar_peft.atomic_files import write_text
from llavar_peft.constants import MODEL_TYPE, RESOLVED_RECIPE_FILE
from llavar_peft.types import expand_home

CARD_FILE = "README.md"
_HUB_CACHE = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots")

_NOT_SHOWN = re.compile(r"[\x00-\x1f\x7f`|]")
"""Characters of a name that would end its line, its code or its cell in a card."""

_OURS = """\
```python
from llavar_peft import load_chat

print(load_chat("this/folder").ask("poster.png", "What does it say?"))
```

    llavar-peft ask --model this/folder --image poster.png "What does it say?"
"""
_STOCK = """\
```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="this/folder")
question = [{"type": "text", "text": "What does it say?"}, {"type": "image", "url": "poster.png"}]
turn = {"role": "user", "content": question}
print(ask(text=[turn], max_new_tokens=100, return_full_text=False)[0]["generated_text"])
```
"""
_RELEASED = """\
The folder is in the layout of the released LLaVAR, without a vision tower. Add it to a copy:

    llavar-peft convert this/folder llavar --to llavar --vision-tower clip-vit-large-patch14-336
    llavar-peft ask --model llavar --image poster.png "What does it say?"
"""
_DELTA = """\
The folder holds the difference to the weights of the base, and answers nothing by itself. Add the base:

    llavar-peft delta apply --base BASE --delta this/folder --out model
"""


def write_weights_card(
    folder: Path,
    title: str,
    sources: Mapping[str, str | Path],
    *,
    adapters: Sequence[Path] = (),
    figures: Mapping[str, str] | None = None,
    delta: bool = False,
) -> None:
    """Write ``README.md`` into a folder of weights that is otherwise complete.

    Args:
        folder: The folder, with its ``config.json``.
        title: What the weights are.
        sources: Folders or hub names by what each was; the first is the base.
        adapters: Folders of the adapters that were merged, whose data and figures are named.
        figures: What was measured of these weights, by its description.
        delta: Whether the weights are a delta.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ours, stock = config.get("model_type") == MODEL_TYPE, "text_config" in config
    fields = {
        "library_name": "transformers" if stock and not ours else "llavar_peft",
        "base_model": portable_name(next(iter(sources.values()))),
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "llavar", "ocr", *(["merge"] if adapters else []), *(["delta"] if delta else [])],
    }
    lines = [f"- {what} `{_shown(portable_name(source))}`" for what, source in sources.items()]
    lines += [f"- adapter `{_shown(adapter_name(one))}`{_trained_on(one / RESOLVED_RECIPE_FILE)}" for one in adapters]
    rows = [f"| {what} | {value} |" for what, value in (figures or {}).items()]
    rows += [row for adapter in adapters for row in _figures(adapter)]
    usage = _DELTA if delta else _OURS if ours else _STOCK if stock else _RELEASED
    sections = [
        f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n",
        f"# {_shown(title)}\n",
        "## Made from\n\n" + "\n".join(lines) + "\n",
        "## Usage\n\n" + usage,
        "\n".join(["## Results\n", "| Figure | Value |", "|---|---|", *rows]) + "\n" if rows else "",
    ]
    write_text(folder / CARD_FILE, "\n".join(section for section in sections if section))


def portable_name(source: str | Path) -> str:
    """Return what a model is called on other machines: its hub name, or the name of its folder."""
    cached = _HUB_CACHE.search(str(source))
    if cached:
        return f"{cached[1]}/{cached[2]}"
    path = expand_home(source)
    return path.resolve().name if path.is_absolute() or path.is_dir() else str(source)


def _shown(name: str) -> str:
    """Return a name as a card shows it."""
    return _NOT_SHOWN.sub("?", name)


def adapter_name(folder: Path) -> str:
    """Return the name of an adapter's folder, or of its run, where all adapters have the same name."""
    name = portable_name(folder)
    return (folder.resolve().parent.name or name) if name == "adapter" else name


def _trained_on(recipe: Path) -> str:
    """Return which records an adapter was trained on, if the recipe in its folder says it."""
    try:
        text = recipe.read_text(encoding="utf-8")
        stages = yaml.safe_load(text)["stages"]
        name = text.partition("\n")[0].rpartition(": ")[2]
        records = next(stage["data"]["records"] for stage in stages if stage["name"] == name)
    except (OSError, ValueError, LookupError, TypeError, StopIteration, yaml.YAMLError):
        return ""
    files = records if isinstance(records, list) else [records]
    return ", trained on " + ", ".join(f"`{_shown(Path(str(file)).name)}`" for file in files)


def _figures(adapter: Path) -> list[str]:
    """Return the rows of the results in an adapter's own card."""
    try:
        text = (adapter / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    _, found, results = text.partition("\n## Results\n")
    rows = [line for line in results.splitlines() if line.startswith("| ") and not line.startswith("| Figure")]
    return (
        [row.replace("| ", f"| `{_shown(adapter_name(adapter))}`, before the merge: ", 1) for row in rows]
        if found
        else []
    )
