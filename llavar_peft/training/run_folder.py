"""A run's folder: what belongs to which stage, what is finished, and what a later stage takes up.

::

    output_dir/
      recipe.yaml  versions.json  stages.json  index.html
      <stage>/  metrics.jsonl  probe.jsonl  dropped.jsonl  stage.json  checkpoint-N/
      <stage>/model/      an earlier stage's result (with <stage>/adapter/ where it is an adapter's, merged)
      model/ or adapter/  the last stage's
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llavar_peft.atomic_files import write_json, write_text
from llavar_peft.constants import PROJECTOR_SAFETENSORS, RESOLVED_RECIPE_FILE, VERSIONS_FILE
from llavar_peft.errors import ConfigError, Fault
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.schema import Lora, Projector, Recipe, Stage
from llavar_peft.recipe.validate import recipe_to_mapping
from llavar_peft.training import run_files
from llavar_peft.training.checkpoint_folders import checkpoints
from llavar_peft.training.save_weights import load_full, load_projector

logger = logging.getLogger(__name__)

STAGES_FILE = "stages.json"
FINISHED_FILE = "stage.json"
# Changing these does not change a run's result.
_HARMLESS = (
    "report_to", "keep_checkpoints", "save_every_steps", "probe", "workers", "output_dir", "gradient_checkpointing",
    "max_tokens",
)  # fmt: skip


class RunFolder:
    """The folder of one recipe.

    Args:
        recipe: The run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.root = Path(recipe.output_dir)

    def directory(self, stage: Stage) -> Path:
        """Where a stage writes."""
        return self.root / stage.name

    def result(self, stage: Stage) -> Path:
        """Where a stage's result goes: the last stage's lies at the top."""
        name = "adapter" if isinstance(stage.tune, Lora) else "model"
        return self.root / name if stage == self.recipe.stages[-1] else self.directory(stage) / name

    def merged(self, stage: Stage) -> Path:
        """Where a LoRA stage that is not the last leaves the model with its adapter merged: the next stage's base."""
        return self.directory(stage) / "model"

    def open(self, *, restart: bool, stages: Sequence[Stage], allow_changes: bool = False) -> None:
        """Make the folder, or takes up one that an earlier run of the same recipe left.

        Args:
            restart: Whether to throw away what it left for ``stages``.
            stages: The stages about to run.
            allow_changes: Whether to go on with another recipe than the folder's.

        Raises:
            ConfigError: The folder holds results of another recipe.
        """
        if restart:
            for stage in stages:
                shutil.rmtree(self.directory(stage), ignore_errors=True)
                shutil.rmtree(self.result(stage), ignore_errors=True)
        self._refuse_another(allow_changes)
        for stage in self.recipe.stages:
            self.directory(stage).mkdir(parents=True, exist_ok=True)
        write_text(self.root / RESOLVED_RECIPE_FILE, dump_recipe(self.recipe))
        write_json(self.root / VERSIONS_FILE, run_files.describe_environment())
        write_json(self.root / STAGES_FILE, [stage.name for stage in self.recipe.stages])

    def finished(self, stage: Stage) -> bool:
        """Whether the stage's result is there, whole."""
        return (self.directory(stage) / FINISHED_FILE).is_file() and self.result(stage).is_dir()

    def mark_finished(self, stage: Stage, *, steps: int) -> None:
        """Say that the stage's result is there; written after it."""
        write_json(
            self.directory(stage) / FINISHED_FILE,
            {"stage": stage.name, "steps": steps, "result": str(self.result(stage).relative_to(self.root))},
        )

    def take_up(self, stage: Stage, model: Any) -> Path:
        """Copy a finished stage's result into a plain model.

        Args:
            stage: A finished stage.
            model: The plain model, changed in place; the last stage's adapter is left out.

        Returns:
            The result's folder.
        """
        folder = self.result(stage)
        if isinstance(stage.tune, Projector):
            load_projector(model, folder / PROJECTOR_SAFETENSORS)
        elif isinstance(stage.tune, Lora):
            if stage != self.recipe.stages[-1]:
                load_full(model, self.merged(stage))
        else:
            load_full(model, folder)
        return folder

    def _refuse_another(self, allowed: bool) -> None:
        written = self.root / RESOLVED_RECIPE_FILE
        begun = any(self.finished(stage) or checkpoints(self.directory(stage)) for stage in self.recipe.stages)
        if not (written.is_file() and begun):
            return
        before = yaml.safe_load(written.read_text(encoding="utf-8"))
        # Through JSON, as the file went through YAML: tuples are lists there.
        now = json.loads(json.dumps(recipe_to_mapping(self.recipe)))
        faults = [
            Fault(path, f"changed since this folder's run began (was {old!r}, is {new!r})", "")
            for path, old, new in _differences(before, now, "")
            if not any(part in _HARMLESS for part in path.split("."))
        ]
        if faults:
            lines = "\n".join(f"  {fault.where}: {fault.what}" for fault in faults)
            if allowed:
                logger.warning("%s: goes on with a changed recipe\n%s", self.root, lines)
                return
            raise ConfigError(
                f"{written}: another recipe's run is in this folder\n{lines}\n"
                "Fix: take another output_dir, undo the change, pass --restart to begin anew, or --allow-changes to "
                "go on all the same.",
                faults,
            )


def _differences(old: Any, new: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differences(a, b, f"{path}.{i}")]
    return [] if old == new else [(path, old, new)]
