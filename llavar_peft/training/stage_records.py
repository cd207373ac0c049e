"""Open a stage's records, check them cheaply, and split off the held-out ones."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from llavar_peft.data.check_records import preflight, summarize_faults
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import RecordStore, open_filled_records
from llavar_peft.data.training_dataset import TrainingDataset, split_holdout
from llavar_peft.errors import DataError
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.schema import Stage

logger = logging.getLogger(__name__)

_SHOWN = 10
_WITHOUT_EFFECT: Final = frozenset({"placeholder", "no_answer", "empty_answer", "last_turn"})
"""Kinds of faults of records that can be read, for which ``data.max_bad_share`` alone decides."""


def stage_records(stage: Stage, processor: LlavarProcessor, *, seed: int) -> tuple[TrainingDataset, TrainingDataset]:
    """Open a stage's data before any time is spent on training.

    Args:
        stage: The stage.
        processor: The model's processor; a copy gets the stage's image mode.
        seed: The seed of the run, which selects the held-out records.

    Returns:
        The records to train on, and the held-out records.

    Raises:
        DataError: More records are malformed or lack their images than the stage allows.
    """
    data = stage.data
    records = open_filled_records(_paths(data.records))
    roots = ImageRoots(_paths(data.images))
    skipped = _faulty_records(stage, records, roots)
    usable = [index for index in range(len(records)) if index not in skipped]
    kept, held = split_holdout(len(usable), data.holdout, seed=seed)
    own = processor
    if data.image_mode is not None:
        own = copy.copy(processor)
        own.image_mode = data.image_mode

    def dataset(positions: list[int]) -> TrainingDataset:
        return TrainingDataset(records, [usable[i] for i in positions], roots, own, max_length=stage.max_length)

    return dataset(kept), dataset(held)


def check_data_paths(stages: Sequence[Stage]) -> None:
    """Check that the stages' files of records and folders of images exist, before the model is loaded.

    Raises:
        DataError: A file does not exist.
        ImageError: A folder does not exist.
    """
    for stage in stages:
        for path in map(Path, _paths(stage.data.records)):
            if not path.exists():
                raise DataError.at(str(path), "no such file", "correct the path to the records")
        ImageRoots(_paths(stage.data.images))


def _faulty_records(stage: Stage, records: RecordStore, roots: ImageRoots) -> set[int]:
    """Return the indices of the records to skip. Raise ``DataError`` if there are more than the stage allows."""
    data = stage.data
    faults = preflight(records, roots)
    if not faults:
        return set()
    skipped = {fault.index for fault in faults}
    stops = data.on_bad_image == "stop" and any(fault.kind not in _WITHOUT_EFFECT for fault in faults)
    stops = stops or len(skipped) > int(data.max_bad_share * len(records))
    without = sum(fault.kind == "image_missing" for fault in faults)
    if stops and without and not data.images:
        raise DataError.at(
            f"stages.{stage.name}.data.images",
            f"not set, and {without} of {len(records)} records name an image",
            "set it to the folder that the image paths start from",
        )
    shown = summarize_faults(faults, len(records))
    listed = "\n".join(str(fault) for fault in shown[:_SHOWN])
    more = f"\nand {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    if stops:
        switch = "data.on_bad_image to skip and " if data.on_bad_image == "stop" else ""
        raise DataError(
            f"stage {stage.name}: {len(skipped)} of {len(records)} records cannot be trained on\n{listed}{more}\n"
            f"Fix: repair them ('llavar-peft data check' lists all), or set {switch}data.max_bad_share to the share "
            "that may be skipped.",
            faults,
        )
    logger.warning("stage %s: %d records are skipped\n%s%s", stage.name, len(skipped), listed, more)
    return skipped


def _paths(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
