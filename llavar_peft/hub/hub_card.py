"""The card of a repository on the hub: that of the folder, with names that mean the same to everyone.

Source of the format: huggingface.co/docs/hub/model-cards and huggingface.co/docs/hub/datasets-cards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llavar_peft.constants import MODEL_TYPE, RESOLVED_RECIPE_FILE
from llavar_peft.errors import DAMAGED, ConfigError, LlavarError
from llavar_peft.hub.hub_contents import Contents, split_card, texts_of
from llavar_peft.page.named_probes import named_probes
from llavar_peft.page.run_figures import probe_rows
from llavar_peft.page.run_log import read_run
from llavar_peft.text_files import read_text
from llavar_peft.weights.io.stated_resolution import resolution_of_adapter
from llavar_peft.weights.io.weights_card import CARD_FILE, portable_name

_PLACEHOLDER = "this/folder"
_NOT_FILLED = "# Model Card for Model ID"
"""The title of the form that peft writes beside an adapter, which says nothing about it."""
_RELATIONS = {"adapter": "adapter", "quantized": "quantized", "model": "finetune", "delta": "finetune"}

_ENGINES = {
    "adapter": """\
## Other engines

`PeftModel.from_pretrained(model, "{name}")` of `peft` loads the adapter into the base model. vLLM and transformers
without `llavar_peft` need the merged model, because the adapter may contain a projector and rows of the embeddings:

    llavar-peft merge --base {base} --adapter {name} --out merged
    llavar-peft convert merged exported --to hf-llava
    vllm serve exported --model-impl transformers
""",
    "llavar": """\
## Other engines

transformers and vLLM need the layout of stock LLaVA:

    llavar-peft convert {name} exported --to hf-llava
    vllm serve exported --model-impl transformers
""",
    "stock": """\
## Other engines

With vLLM:

    vllm serve {name} --model-impl transformers
""",
    "quantized": """\
## Other engines

The language model's linear layers are stored in 4 bits by bitsandbytes, and only `llavar_peft` opens this layout. For
other engines, export the unquantized model `{base}`:

    llavar-peft convert {base} exported --to hf-llava
    vllm serve exported --model-impl transformers
""",
}
_RECORDS = """\
---
{fields}---

# {title}

{size}, for training LLaVAR and other models that read text in images.

## Usage

With `llavar_peft`, which reads it under the name `hf://{name}`:

    llavar-peft data check hf://{name}

With `datasets`:

```python
from datasets import load_dataset

records = load_dataset("{name}", split="train")
```

Each row has an `id`, the `images`, and the {column}, in whose texts `<image>` marks the place of an image.
"""
_MODEL = """\
# {title}

## Made from

{sources}

## Usage

```python
from llavar_peft import load_chat

print(load_chat("{name}").ask("poster.png", "What does it say?"))
```

    llavar-peft ask --model {name} --image poster.png "What does it say?"
"""


def finish_card(contents: Contents, name: str, names: Mapping[str, str]) -> str:
    """Return the card of a model, an adapter or a delta for the hub.

    Args:
        contents: The folder; where it has no card, one is made from its run.
        name: The repository.
        names: Hub name of each base, by what the settings call it.
    """
    path = contents.folder / CARD_FILE
    fields, body = split_card(
        read_text(path, error=ConfigError) if path.is_file() else _from_run(contents, name, names)
    )
    if _NOT_FILLED in body:
        body = split_card(_from_run(contents, name, names))[1]
    for source, hub in names.items():
        body = _rename(body, portable_name(source), hub) if source else body
    body = body.replace(_PLACEHOLDER, name)
    hubs = list(names.values())
    base = hubs[0]
    tags = [tag for tag in texts_of(fields.get("tags")) if not tag.startswith("base_model:")]
    fields |= {
        "library_name": fields.get("library_name", "llavar_peft"),
        "base_model": base if len(hubs) == 1 else hubs,
        "base_model_relation": _RELATIONS[contents.kind],
        "pipeline_tag": "image-text-to-text",
        "tags": tags or ["llava", "llavar", "ocr"],
    }
    if len(hubs) > 1 or (contents.kind == "model" and "merge" in tags):
        del fields["base_model_relation"]  # the hub has none for a model made of several
    if found := _data_sets(contents.folder):
        fields["datasets"] = found
    dumped = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"---\n{dumped}---\n{body.rstrip()}\n\n{_engines(contents).format(name=name, base=base)}".rstrip() + "\n"


def records_card(name: str, title: str, size: str, *, column: str, count: int) -> str:
    """Return the card of a data set.

    Args:
        name: The repository.
        title: What the records are.
        size: Their number, in words.
        column: The name of the column with the texts.
        count: The number of records.
    """
    fields = {
        "task_categories": ["image-text-to-text"],
        "tags": ["llavar", "ocr"],
        "size_categories": [_size_category(count)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    dumped = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return _RECORDS.format(fields=dumped, title=title, size=size, name=name, column=f"`{column}`")


def _engines(contents: Contents) -> str:
    """Return how other engines run what is pushed; nothing for resolutions that none of them has."""
    stated = resolution_of_adapter(contents.folder) or {}
    if stated.get("type") == "cross_attention" or stated.get("pool", 1) != 1:
        return ""
    if contents.kind in ("adapter", "quantized"):
        return _ENGINES[contents.kind]
    if contents.kind == "delta":
        return ""
    config = contents.config or {}
    if config.get("model_type") == MODEL_TYPE:
        return _ENGINES["llavar"]
    return _ENGINES["stock"] if "text_config" in config else ""


def _rename(body: str, local: str, hub: str) -> str:
    """Replace a folder's name where a card names a model: in quotes, in code, and in options."""
    name = re.escape(local)
    body = re.sub(f'(["`]){name}(["`])', lambda found: f"{found[1]}{hub}{found[2]}", body)
    return re.sub(rf"(--(?:base|target) ){name}(?=\s)", lambda found: f"{found[1]}{hub}", body)


def _from_run(contents: Contents, name: str, names: Mapping[str, str]) -> str:
    """Return a card for a model that a run trained in full: its parts, its data and its figures."""
    run = contents.folder.parent
    if run.name and not (run / RESOLVED_RECIPE_FILE).is_file() and (run.parent / RESOLVED_RECIPE_FILE).is_file():
        run = run.parent
    sources = [f"- `{one}`" for one in names.values()]
    sources += [f"- the records `{one}`" for one in _records(run)]
    text = _MODEL.format(title=name.partition("/")[2], sources="\n".join(sources), name=name)
    try:
        rows = probe_rows(named_probes(read_run(run).stages)) if (run / RESOLVED_RECIPE_FILE).is_file() else []
    except LlavarError:
        rows = []
    if not rows:
        return text
    titles = [title for title, _ in rows[0]]
    table = [titles, ["---"] * len(titles), *([value for _, value in row] for row in rows)]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    note = "On held-out records of the run. The interval is Wilson's, at 95 %, in percent.\n"
    return f"{text}\n## Results\n\n{note}\n" + "\n".join(lines) + "\n"


def _records(run: Path) -> list[str]:
    return [portable_name(one) if Path(one).is_absolute() else Path(one).name for one in _sources(run)]


def _data_sets(folder: Path) -> list[str]:
    """Return the data sets of the hub that a model was trained on."""
    known = [*_sources(folder), *_sources(folder.parent)]
    names = [one.split("://", 1)[1].partition("?")[0] for one in known if one.startswith("hf://")]
    return list(dict.fromkeys("/".join(one.removeprefix("datasets/").split("/")[:2]) for one in names))


def _sources(folder: Path) -> list[str]:
    """Return the records that the recipe in a folder names."""
    found: list[str] = []
    try:
        stages = yaml.safe_load((folder / RESOLVED_RECIPE_FILE).read_text(encoding="utf-8"))["stages"]
        for stage in stages:
            data: Any = stage["data"]
            listed = data.get("sources") or [data]
            for one in listed:
                found += texts_of(one.get("records"))
    except (*DAMAGED, yaml.YAMLError):
        return []
    return list(dict.fromkeys(found))


def _size_category(count: int) -> str:
    for limit, name in ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if count < limit:
            return name
    return "1M<n<10M"
