"""Open a stage's records, check them cheaply, and split off the held-out ones."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import Final

from llavar_peft.data.check_records import RecordFinding, preflight, summarize_faults
from llavar_peft.data.conversation_template import RoleTemplate, split_placeholders
from llavar_peft.data.hub_sources import TableSelection, is_hub_source
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.image_views import ImageViews
from llavar_peft.data.record_mixture import OpenSource, RecordMixture
from llavar_peft.data.record_store import check_source_exists, open_filled_records, parse_record
from llavar_peft.data.record_tables import Table
from llavar_peft.data.record_texts import sample_texts
from llavar_peft.data.renamed_columns import RenamedColumns
from llavar_peft.data.training_dataset import TrainingDataset, split_holdout
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.models.compare_resolutions import ResolutionFigures, compare_resolutions
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.data_sources import columns_of, paths_of, sources_of
from llavar_peft.recipe.resolution import resolution_from
from llavar_peft.recipe.schema import DataSource, Stage

logger = logging.getLogger(__name__)

_SHOWN = 10  # faults in a message
_TEXTS_MEASURED: Final = 200  # records whose letter heights are compared
_ORDERS_READ: Final = 500  # about this many records are examined for the order of image and question
_FEWEST_ORDERS: Final = 20  # records; the order in fewer says nothing about the data
_RARE: Final = 0.05  # share of the records with the order of inference that is too small to learn it
_MOSTLY: Final = 0.5  # share of the text that is too small, from which the user is warned
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
    mixture = RecordMixture([_open(source) for source in sources_of(data)])
    skipped = _faulty_records(stage, mixture)
    usable = [index for index in range(len(mixture.records)) if index not in skipped]
    train_positions, held_out_positions = split_holdout(len(usable), data.holdout, seed=seed)
    if data.image_mode == "keep" and processor.resolution is not None:
        what = "keep has no images of one size, which the model's resolution needs"
        raise ConfigError.at(f"stages.{stage.name}.data.image_mode", what, "remove it")
    if data.image_mode is not None:
        processor = copy.copy(processor)
        processor.image_mode = data.image_mode

    def make_dataset(positions: list[int]) -> TrainingDataset:
        indices, roots = [usable[position] for position in positions], mixture.sources[0].roots
        return TrainingDataset(mixture.records, indices, roots, processor, max_length=stage.max_length, mixture=mixture)

    train_set = make_dataset(train_positions)
    _warn_of_small_text(stage, train_set, processor, seed=seed)
    _warn_of_image_order(stage, train_set, processor)
    return train_set, make_dataset(held_out_positions)


def _warn_of_small_text(stage: Stage, dataset: TrainingDataset, processor: LlavarProcessor, *, seed: int) -> None:
    """Warn if the model cannot read most of the text that it is trained on, where records state its height."""
    sample = sample_texts(
        dataset.records, dataset.roots_of, indices=dataset.indices.tolist(), count=_TEXTS_MEASURED, seed=seed
    )
    if not sample.texts:
        return
    report = compare_resolutions(
        sample.texts,
        ImageViews.of_model(processor, processor.image_mode),
        own=resolution_from(processor.resolution, "processor_config.json:resolution"),
        max_length=stage.max_length,
    )
    if report is None or report.current is None or report.current.share_below <= _MOSTLY:
        return
    better = [figures for figures in report.recommended if figures.share_below < report.current.share_below]
    fix = "crop the images to their text"
    if better:
        readable = 100 * (1 - max(figures.share_below for figures in better))
        resolutions = " or ".join(_describe_cost(figures, stage.max_length) for figures in better)
        fix = f"to read {readable:.0f} % of it, set under model: {resolutions}"
    logger.warning(
        "stage %s: %.0f %% of the supervised text is below %g px in the vision tower's input, where letters cannot be "
        "read (%d records with known letter heights). Fix: %s; 'llavar-peft eval diagnose --records' compares more.",
        stage.name, 100 * report.current.share_below, report.smallest, report.records, fix,
    )  # fmt: skip


def _warn_of_image_order(stage: Stage, dataset: TrainingDataset, processor: LlavarProcessor) -> None:
    """Warn if hardly any record has the image on that side of the question where it stands in inference.

    A model that always saw the image first answers a question that precedes it as if it had not been asked.
    """
    template = processor.conversation_template
    if processor.sep_image_conv_front or (isinstance(template, RoleTemplate) and template.image_first):
        return  # The image is moved there, whatever the record says.
    inference_has_image_first = template.question("", 1)[0] is None
    image_first_in_records = _sample_image_first(dataset)
    examined, agreeing = len(image_first_in_records), image_first_in_records.count(inference_has_image_first)
    if examined < _FEWEST_ORDERS or agreeing > _RARE * examined:
        return
    in_records, in_inference = ("after", "before") if inference_has_image_first else ("before", "after")
    fitting_text = "<image>\\n<question>" if inference_has_image_first else "<question>\\n<image>"
    logger.warning(
        "stage %s: the image stands %s the question in %d of %d records, but inference places it %s it with "
        "template %s. The model may ignore such a question. Fix: write '%s' in at least half of the records.",
        stage.name, in_records, examined - agreeing, examined, in_inference, processor.template, fitting_text,
    )  # fmt: skip


def _sample_image_first(dataset: TrainingDataset) -> list[bool]:
    """Return for a sample of the records whether the image comes first; those whose image stands alone are left out."""
    image_comes_first: list[bool] = []
    step = max(1, len(dataset) // _ORDERS_READ)
    for index in dataset.indices[::step].tolist():
        try:
            turns = parse_record(dataset.records[index], dataset.records.where(index)).turns
        except DataError:
            continue
        contents = (split_placeholders(turn.text.strip()) for turn in turns)
        with_image = next((content for content in contents if None in content), [])
        parts = [part for part in with_image if part != ""]
        if len(parts) > 1:
            image_comes_first.append(parts[0] is None)
    return image_comes_first


def _describe_cost(figures: ResolutionFigures, max_length: int) -> str:
    length = f", max_length {figures.longest}" if figures.longest > max_length else ""
    return f"{figures.recipe} ({figures.image_tokens:.0f} image tokens a record{length})"


def _open(source: DataSource) -> OpenSource:
    selection = TableSelection(source.split, source.config, source.streaming, columns_of(source))
    records = open_filled_records(paths_of(source.records), selection)
    return OpenSource(records, ImageRoots(paths_of(source.images)), source.weight)


def record_files(stage: Stage, dataset: TrainingDataset) -> list[str]:
    """Return the files and folders that hold a stage's records; of a data set of the hub, the files in the cache.

    Args:
        stage: The stage.
        dataset: From ``stage_records``.
    """
    names = [name for source in sources_of(stage.data) for name in paths_of(source.records)]
    opened_parts = dataset.mixture.records.parts if dataset.mixture is not None else ()
    files: list[str] = []
    for name, opened in zip(names, opened_parts, strict=True):
        if isinstance(opened, Table | RenamedColumns) and is_hub_source(name):
            files += [str(path) for path in opened.files()]
        else:
            files.append(name)
    return files


def check_data_paths(stages: Sequence[Stage]) -> None:
    """Check that the stages' records and folders of images exist, before the model is loaded.

    Data sets of the hub are downloaded.

    Raises:
        DataError: A file does not exist.
        ImageError: A folder does not exist.
        EnvironmentFaultError: A data set cannot be downloaded.
    """
    for source in (source for stage in stages for source in sources_of(stage.data)):
        for path in paths_of(source.records):
            check_source_exists(path)
        ImageRoots(paths_of(source.images))
        if any(map(is_hub_source, paths_of(source.records))):
            _open(source)


def _faulty_records(stage: Stage, mixture: RecordMixture) -> set[int]:
    """Return the indices of the records to skip. Raise ``DataError`` if there are more than the stage allows."""
    data, count = stage.data, len(mixture.records)
    faults_by_source = [preflight(source.records, source.roots) for source in mixture.sources]
    faults = [
        dataclasses.replace(fault, index=fault.index + start)
        for start, source_faults in zip(mixture.starts, faults_by_source, strict=False)
        for fault in source_faults
    ]
    if not faults:
        return set()
    skipped = {fault.index for fault in faults}
    has_bad_image = any(fault.kind not in _WITHOUT_EFFECT for fault in faults)
    stops = (data.on_bad_image == "stop" and has_bad_image) or len(skipped) > int(data.max_bad_share * count)
    if stops:
        _check_image_folders(stage, mixture, faults_by_source)
    shown = summarize_faults(faults, count)
    lines = "\n".join(str(fault) for fault in shown[:_SHOWN])
    more = f"\nand {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    if stops:
        switch = "data.on_bad_image to skip and " if data.on_bad_image == "stop" else ""
        raise DataError(
            f"stage {stage.name}: {len(skipped)} of {count} records cannot be trained on\n{lines}{more}\n"
            f"Fix: repair them ('llavar-peft data check' lists all), or set {switch}data.max_bad_share to the share "
            "that may be skipped.",
            faults,
        )
    logger.warning("stage %s: %d records are skipped\n%s%s", stage.name, len(skipped), lines, more)
    return skipped


def _check_image_folders(
    stage: Stage, mixture: RecordMixture, faults_by_source: Sequence[Sequence[RecordFinding]]
) -> None:
    """Raise ``DataError`` if images are missing because no folder was given for them, which is one fault, not many."""
    for number, (source, faults) in enumerate(zip(mixture.sources, faults_by_source, strict=True)):
        missing = sum(fault.kind == "image_missing" for fault in faults)
        if missing and not source.roots.roots:
            field = f"sources.{number}.images" if stage.data.sources else "images"
            raise DataError.at(
                f"stages.{stage.name}.data.{field}",
                f"not set, and {missing} of {len(source.records)} records name an image",
                "set it to the folder that the image paths start from",
            )
