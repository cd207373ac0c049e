"""The model card and the recipe in an adapter's folder.

Source of the format: huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llavar_peft.atomic_files import write_text
from llavar_peft.constants import METRICS_FILE, PROBE_FILE, RESOLVED_RECIPE_FILE
from llavar_peft.data.hub_sources import is_hub_source
from llavar_peft.errors import count_of
from llavar_peft.page.run_figures import wilson
from llavar_peft.recipe.data_sources import paths_of, sources_of
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.schema import Lora, ModelConfig, Recipe, Stage
from llavar_peft.recipe.validate import model_from_mapping
from llavar_peft.training.run_files import read_metric_lines
from llavar_peft.weights.adapter.adapter_files import BASE_FILE, read_base_settings
from llavar_peft.weights.adapter.adapter_layouts import open_adapter
from llavar_peft.weights.adapter.adapter_parts import AdapterPart, row_indices, split_adapter
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.weights_card import CARD_FILE, portable_name
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE, digest, read_fingerprint


def write_card(folder: Path, recipe: Recipe, stage: Stage, *, run: Path, step: int) -> None:
    """Write ``README.md`` and ``recipe.yaml`` into an adapter's folder that is otherwise complete.

    Args:
        folder: The folder of the adapter.
        recipe: The run.
        stage: The stage that trained the adapter.
        run: The folder of the stage, with its figures.
        step: Number of optimizer steps done.
    """
    write_text(folder / RESOLVED_RECIPE_FILE, f"# Trained by stage: {stage.name}\n{dump_recipe(recipe)}")
    base = model_from_mapping(read_base_settings(folder).fields, str(folder / BASE_FILE))
    stored = open_adapter(folder)
    parts, settings = split_adapter(stored.table), stored.settings
    sections = [
        _header(base, stage),
        f"# {stage.name}: an adapter for LLaVAR\n",
        _about_base(folder, base),
        _about_training(parts, settings, stage, step),
        _USE.format(
            base=portable_name(base.checkpoint or base.language_model or ""),
            kind=_base_call(base),
            others="" if base.resolution is None else f", {type(base.resolution).__name__}",
        ),
        _figures(run, step),
    ]
    write_text(folder / CARD_FILE, "\n".join(section for section in sections if section))


def _header(base: ModelConfig, stage: Stage) -> str:
    variant = stage.tune.variant if isinstance(stage.tune, Lora) else ""
    sources = [base.checkpoint] if base.checkpoint else [base.language_model, base.vision_tower]
    named = [portable_name(source) for source in sources if source]
    fields = {
        "library_name": "peft",
        "base_model": named[0] if len(named) == 1 else named,
        "pipeline_tag": "image-text-to-text",
        "tags": list(dict.fromkeys(["lora", variant, "llava", "llavar", "ocr", f"base_model:adapter:{named[0]}"])),
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _about_base(folder: Path, base: ModelConfig) -> str:
    fingerprints = read_fingerprint(folder / FINGERPRINT_FILE) or {}
    lines = ["## Base model\n"]
    if base.checkpoint is not None:
        lines.append(f"- checkpoint `{portable_name(base.checkpoint)}`")
    else:
        lines.append(f"- a new LLaVAR built from the language model `{portable_name(base.language_model or '')}`")
    if base.vision_tower is not None:
        lines.append(f"- vision tower `{portable_name(base.vision_tower)}`")
    if base.projector is not None:
        lines.append(f"- projector `{portable_name(base.projector)}` loaded into it")
    stored = {None: "in full precision", "nf4": "in 4 bits (nf4, double quantization)", "int8": "in 8 bits"}
    lines.append(f"- stored {stored[base.quantize]} during training")
    if "base" in fingerprints:
        tensors = fingerprints["base"]["tensors"]
        lines.append(f"- fingerprint `{digest(fingerprints['base'])}` of {len(tensors)} tensors (`{FINGERPRINT_FILE}`)")
    return "\n".join(lines) + "\n"


def _about_training(parts: tuple[AdapterPart, ...], settings: dict[str, Any], stage: Stage, step: int) -> str:
    tune, optim = stage.tune, stage.optim
    if not isinstance(tune, Lora):
        return ""
    in_language_model = (part for part in parts if not part.module.startswith(tensor_names.TOWER))
    adapted = list(dict.fromkeys(part.kind for part in in_language_model if "A" in part.tensors))
    count = sum(part.parameters for part in parts)
    target = tune.target if isinstance(tune.target, str) else ", ".join(tune.target)
    lines = [
        "## Training\n",
        f"- {tune.variant}, rank {tune.rank}, alpha {tune.alpha:g}, dropout {tune.dropout:g}",
        f"- applied to {target}: {', '.join(adapted)} of the language model; {_about_tower(tune)}",
    ]
    if tune.variant == "pissa":
        lines.append(
            f"- saved as an ordinary LoRA of rank {settings['r']} for the unchanged base model; this is equivalent to "
            f"PiSSA of rank {tune.rank} on its residual"
        )
    for part in parts:
        if part.in_full:
            lines.append(f"- `{part.module}` in full")
        elif "rows" in part.tensors:
            lines.append(f"- rows {', '.join(map(str, row_indices(part, settings)))} of `{part.module}`")
    rates = [f"{optim.learning_rate:g}"]
    rates_of_parts = {
        "projector": optim.projector_learning_rate,
        "rows": optim.rows_learning_rate,
        "vision tower": tune.tower_learning_rate,
    }
    for name, rate in rates_of_parts.items():
        if rate is not None:
            rates.append(f"{name} {rate:g}")
    lines.append(
        f"- {step} steps of {stage.global_batch_size} records, learning rate {', '.join(rates)}, {stage.optim.schedule}"
    )
    sources = [path for source in sources_of(stage.data) for path in paths_of(source.records)]
    names = [source if is_hub_source(source) else Path(source).name for source in sources]
    lines.append("- trained on " + ", ".join(f"`{name}`" for name in names))
    lines.append(f"- {count:,} parameters; the complete recipe is in `{RESOLVED_RECIPE_FILE}`, stage `{stage.name}`")
    return "\n".join(lines) + "\n"


def _about_tower(tune: Lora) -> str:
    if tune.tower_rank is None:
        return "the vision tower is frozen"
    return f"in the vision tower rank {tune.tower_rank}, up to the layer whose output is projected"


def _base_call(base: ModelConfig) -> str:
    resolution = "" if base.resolution is None else f", resolution={base.resolution!r}"
    if base.checkpoint is not None:
        tower = f', vision_tower="{portable_name(base.vision_tower)}"' if base.vision_tower else ""
        return f'checkpoint="{portable_name(base.checkpoint)}"{tower}{resolution}'
    language, tower = portable_name(base.language_model or ""), portable_name(base.vision_tower or "")
    return f'language_model="{language}", vision_tower="{tower}"{resolution}'


_USE = """\
## Usage

With `llavar_peft`, which checks that the base model is the right one:

```python
from llavar_peft import ModelConfig, build_model, load_adapter{others}

model, processor = build_model(ModelConfig({kind}))
model = load_adapter(model, "this/folder")
```

With `peft` alone:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "this/folder")  # model: the base model, as above
```

On the command line, ask a question, verify the adapter, merge it into its base model, or publish the merged model as a
delta to LLaMA:

    llavar-peft ask --model this/folder --image poster.png "What does it say?"
    llavar-peft adapter verify this/folder --base {base}
    llavar-peft merge --base {base} --adapter this/folder --out merged
    llavar-peft delta make --base LLAMA --target {base} --adapter this/folder --out delta
"""


def _figures(run: Path, step: int) -> str:
    rows = list(_measured(run, step))
    if not rows:
        return ""
    return "\n".join(["## Results\n", "| Figure | Value |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]) + "\n"


def _measured(run: Path, step: int) -> Iterator[tuple[str, str]]:
    steps = _lines(run / METRICS_FILE, step, "loss", "tokens", "supervised_tokens")
    if steps:
        yield "loss of the first and the last step", f"{steps[0]['loss']:.4f}, {steps[-1]['loss']:.4f}"
        yield (
            "tokens, and supervised tokens among them",
            f"{_total(steps, 'tokens'):,}, {_total(steps, 'supervised_tokens'):,}",
        )
    for name, what, form in (
        ("held_out_loss", "held-out loss", ".4f"),
        ("exact_match", "exact match on held-out images", ".1%"),
        ("character_accuracy", "character accuracy on held-out images", ".1%"),
    ):
        probes = _lines(run / PROBE_FILE, step, name)
        if probes:
            first, last = probes[0], probes[-1]
            before = f"; {first[name]:{form}} at step {first['step']}" if first is not last else ""
            yield what, f"{last[name]:{form}} at step {last['step']}{_interval(last, name)}{before}"


def _interval(line: dict[str, Any], name: str) -> str:
    count, share = line.get("count"), line[name]
    if name != "exact_match" or not isinstance(count, int) or count < 1 or not 0 <= share <= 1:
        return ""
    low, high = wilson(share, count)
    return f" (95 % interval {low:.1%} to {high:.1%}, {count_of(count, 'image')})"


def _lines(path: Path, step: int, *names: str) -> list[dict[str, Any]]:
    """Return the lines up to a step that have numbers of these names."""
    return [
        line
        for line in read_metric_lines(path)
        if all(isinstance(line.get(name), float | int) for name in ("step", *names)) and line["step"] <= step
    ]


def _total(lines: list[dict[str, Any]], name: str) -> int:
    return sum(int(line[name]) for line in lines)
