"""The folder of a run: its layout, which stages are finished, and a lock against a second run.

::

    output_dir/
      recipe.yaml  versions.json  stages.json  index.html
      <stage>/  metrics.jsonl  probe.jsonl  dropped.jsonl  stage.json  checkpoint-N/
      <stage>/model/      result of an earlier stage (for an adapter: merged, with <stage>/adapter/)
      model/ or adapter/  result of the last stage
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from llavar_peft.atomic_files import disk_errors, hold_lock, write_json, write_text
from llavar_peft.constants import PROJECTOR_SAFETENSORS, RESOLVED_RECIPE_FILE, VERSIONS_FILE
from llavar_peft.errors import DAMAGED, ConfigError, Fault, describe_reason
from llavar_peft.recipe.recipe_yaml import dump_recipe, parse_yaml
from llavar_peft.recipe.schema import Lora, Projector, Recipe, Stage
from llavar_peft.recipe.validate import recipe_from_mapping, recipe_to_mapping
from llavar_peft.text_files import read_json, read_text
from llavar_peft.training import run_files
from llavar_peft.training.checkpoint_folders import list_checkpoints, remove_unfinished
from llavar_peft.training.save_weights import load_full, load_projector

logger = logging.getLogger(__name__)

STAGES_FILE = "stages.json"
FINISHED_FILE = "stage.json"
LOCK_FILE = ".lock"
_HARMLESS = (
    "report_to", "keep_checkpoints", "save_every_steps", "probe", "workers", "output_dir", "gradient_checkpointing",
    "max_tokens", "process_timeout",
)  # fmt: skip
"""Fields that may change in a resumed run, because they do not change its result."""
_ANOTHER_MODEL = ("model.resolution", "model.projector_type")
"""Fields that decide which weights a model has."""


def keep_holdout(recipe: Recipe) -> Recipe:
    """Return a recipe with the held-out records that its unfinished run began with, where it does not name a number.

    Runs of earlier versions held out none by default; with another number, they could not be resumed.
    """
    written = Path(recipe.output_dir) / RESOLVED_RECIPE_FILE
    if not written.is_file():
        return recipe
    try:
        stages = _read_written(written)["stages"]
        holdouts = {stage["name"]: stage["data"]["holdout"] for stage in stages}
    except (OSError, ValueError, LookupError, TypeError):
        return recipe  # opening the folder reports what is wrong

    def with_holdout(stage: Stage) -> Stage:
        if stage.data.holdout is not None:
            return stage
        data = dataclasses.replace(stage.data, holdout=holdouts.get(stage.name))
        return dataclasses.replace(stage, data=data)

    return dataclasses.replace(recipe, stages=tuple(map(with_holdout, recipe.stages)))


class RunFolder:
    """The folder of a recipe's run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.root = Path(recipe.output_dir)

    def directory(self, stage: Stage) -> Path:
        """Return the folder of a stage."""
        return self.root / stage.name

    def result(self, stage: Stage) -> Path:
        """Return the folder of a stage's result; that of the last stage is at the top."""
        name = "adapter" if isinstance(stage.tune, Lora) else "model"
        return self.root / name if stage == self.recipe.stages[-1] else self.directory(stage) / name

    def merged(self, stage: Stage) -> Path:
        """Return the folder of the merged model of a LoRA stage that is not the last: the base of the next stage."""
        return self.directory(stage) / "model"

    def open(self, *, restart: bool, stages: Sequence[Stage], allow_changes: bool = False) -> None:
        """Create the folder, or check that an existing one belongs to the same recipe, unless changes are allowed.

        Args:
            restart: Whether to delete the existing results of ``stages`` first.

        Raises:
            ConfigError: The folder holds results of another recipe.
        """
        if restart:
            for stage in stages:
                shutil.rmtree(self.directory(stage), ignore_errors=True)
                shutil.rmtree(self.result(stage), ignore_errors=True)
        self._check_recipe(allow_changes)
        with disk_errors(self.root):
            for stage in self.recipe.stages:
                self.directory(stage).mkdir(parents=True, exist_ok=True)
        write_text(self.root / RESOLVED_RECIPE_FILE, dump_recipe(self.recipe))
        write_json(self.root / VERSIONS_FILE, run_files.describe_environment())
        write_json(self.root / STAGES_FILE, [stage.name for stage in self.recipe.stages])

    def select_stages(self, names: Sequence[str] | None) -> tuple[Stage, ...]:
        """Return the stages of these names; None means all.

        Raises:
            ConfigError: The recipe has no stage of a name.
        """
        known = [stage.name for stage in self.recipe.stages]
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise ConfigError.at(
                "stages", f"unknown stage (got {', '.join(unknown)})", f"use one of {', '.join(known)}"
            )
        return tuple(stage for stage in self.recipe.stages if names is None or stage.name in names)

    def check_not_needed(self, skipped: Stage, selected: Sequence[Stage]) -> None:
        """Check that no selected stage builds on a stage that has not run and is not selected.

        Raises:
            ConfigError: A selected stage needs the result of the other.
        """
        order = [stage.name for stage in self.recipe.stages]
        later = [stage.name for stage in selected if order.index(stage.name) > order.index(skipped.name)]
        model = self.recipe.model
        has_projector = model.projector is not None or model.checkpoint is not None
        if later and not has_projector:
            raise ConfigError.at(
                f"stages.{later[0]}",
                f"needs the result of stage {skipped.name!r}, which has not run in {self.recipe.output_dir}",
                f"run {skipped.name!r} first, or give its result as model.projector",
            )

    def remove_checkpoints(self, stage: Stage) -> None:
        """Remove all checkpoints of a stage, finished or not."""
        remove_unfinished(self.directory(stage))
        for checkpoint in list_checkpoints(self.directory(stage)):
            shutil.rmtree(checkpoint)

    def finished(self, stage: Stage) -> bool:
        """Whether a stage's complete result exists."""
        return (self.directory(stage) / FINISHED_FILE).is_file() and self.result(stage).is_dir()

    def mark_finished(self, stage: Stage, *, steps: int) -> None:
        """Record that a stage's result is complete; call this after the result was written."""
        write_json(
            self.directory(stage) / FINISHED_FILE,
            {"stage": stage.name, "steps": steps, "result": str(self.result(stage).relative_to(self.root))},
        )

    def load_result(self, stage: Stage, model: Any) -> Path:
        """Load a finished stage's result into a plain model, except the last stage's adapter; return its folder."""
        folder = self.result(stage)
        if isinstance(stage.tune, Projector):
            load_projector(model, folder / PROJECTOR_SAFETENSORS)
        elif isinstance(stage.tune, Lora):
            if stage != self.recipe.stages[-1]:
                load_full(model, self.merged(stage))
        else:
            load_full(model, folder)
        return folder

    def _check_recipe(self, allow_changes: bool) -> None:
        """Check that a run that has begun in the folder is one of this recipe, apart from harmless fields."""
        written = self.root / RESOLVED_RECIPE_FILE
        started = any(self.finished(stage) or list_checkpoints(self.directory(stage)) for stage in self.recipe.stages)
        self._check_stages()
        if not (written.is_file() and started):
            return
        faults = [
            Fault(path, f"changed since this run started (was {old!r}, is {new!r})", "")
            for path, old, new in _differences(_read_written(written), _to_mapping(self.recipe), "")
            if not any(part in _HARMLESS for part in path.split("."))
        ]
        if not faults:
            return
        lines = "\n".join(f"  {fault.where}: {fault.what}" for fault in faults)
        self._check_not_prolonged(faults)
        model_faults = [fault for fault in faults if fault.where.startswith(_ANOTHER_MODEL)]
        if allow_changes and model_faults:
            raise ConfigError(
                f"{written}: the run's checkpoints belong to a model of other weights\n"
                + "\n".join(f"  {fault.where}: {fault.what}" for fault in model_faults)
                + "\nFix: undo the change, choose another output_dir, or pass --restart to start again.",
                model_faults,
            )
        if allow_changes:
            logger.warning("%s: continues with a changed recipe\n%s", self.root, lines)
            return
        raise ConfigError(
            f"{written}: the folder holds a run of another recipe\n{lines}\n"
            "Fix: choose another output_dir, undo the change, pass --restart to start again, or --allow-changes to "
            "continue anyway.",
            faults,
        )

    def _check_stages(self) -> None:
        """Check that the folder holds no results of stages that this recipe does not have.

        Raises:
            ConfigError: It does. They, the page and the recipe would be mixed with those of this run.
        """
        stages_file, own_names = self.root / STAGES_FILE, {stage.name for stage in self.recipe.stages}
        try:
            names = [str(name) for name in read_json(stages_file)] if stages_file.is_file() else []
            foreign = [name for name in names if name not in own_names and self._has_results(name)]
        except DAMAGED as error:
            what = f"not a list of stages ({describe_reason(error)})"
            raise ConfigError.at(str(stages_file), what, "choose another output_dir, or delete the folder") from error
        if foreign:
            raise ConfigError.at(
                "output_dir",
                f"{self.root} holds the run of another recipe (with {', '.join(foreign)}, expected only "
                f"{', '.join(sorted(own_names))})",
                "choose another output_dir, or delete the folder",
            )

    def _has_results(self, name: str) -> bool:
        folder = self.root / name
        return (folder / FINISHED_FILE).is_file() or bool(list_checkpoints(folder))

    def _check_not_prolonged(self, faults: Sequence[Fault]) -> None:
        """Reject more steps for a finished stage, whose checkpoints are removed: the run would end without a step."""
        for number, stage in enumerate(self.recipe.stages):
            paths = {f"stages.{number}.max_steps", f"stages.{number}.epochs"}
            if self.finished(stage) and any(fault.where in paths for fault in faults):
                raise ConfigError.at(
                    f"stages.{stage.name}",
                    "is finished, and its checkpoints were removed, so that it cannot be continued with another number "
                    "of steps",
                    "undo the change, pass --restart to train the stage again, or start a new run from its result "
                    f"({self.result(stage)})",
                )


def _read_written(path: Path) -> Any:
    """Return a written recipe, with the defaults of the fields that the version that wrote it did not have."""
    mapping = parse_yaml(read_text(path, error=ConfigError), str(path))
    with suppress(ConfigError):
        return _to_mapping(recipe_from_mapping(mapping, str(path)))
    return mapping


def _to_mapping(recipe: Recipe) -> Any:
    # Through JSON, so that tuples become lists as in the YAML file.
    return json.loads(json.dumps(recipe_to_mapping(recipe)))


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path, the old and the new value of each difference between two recipes as plain data."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (old_entry, new_entry) in enumerate(zip(old, new, strict=True)):
            yield from _differences(old_entry, new_entry, f"{path}.{index}")
    elif old != new:
        yield path, old, new


def lock_folder(folder: Path) -> AbstractContextManager[None]:
    """Return a lock on a run's folder, which is created if necessary. A process that dies releases the lock.

    Raises:
        EnvironmentFaultError: Another process holds the lock; the message names it.
    """
    return hold_lock(folder / LOCK_FILE, where=folder, what="another run is active in this folder")
