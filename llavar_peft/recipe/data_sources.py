"""The sources of a stage's records, however the recipe writes them."""

from __future__ import annotations

import dataclasses

from llavar_peft.recipe.schema import DataConfig, DataSource


def sources_of(data: DataConfig) -> tuple[DataSource, ...]:
    """Return the sources of a stage's records: those of the list, or the single one of ``records``."""
    if data.records is not None:
        return (
            DataSource(
                records=data.records,
                images=data.images,
                split=data.split,
                config=data.config,
                streaming=data.streaming,
                columns=data.columns,
            ),
        )
    return tuple(
        source if source.images else dataclasses.replace(source, images=data.images) for source in data.sources
    )


def paths_of(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return a field that holds one path or several as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given)


def columns_of(source: DataSource) -> tuple[tuple[str, str], ...]:
    """Return the columns that a source renames: each name that is looked for, and the name of the column."""
    named = ((field.name, getattr(source.columns, field.name)) for field in dataclasses.fields(source.columns))
    return tuple((name, column) for name, column in named if column)


def size_of_epoch(counts: tuple[int, ...], held_out: int, data: DataConfig) -> int:
    """Estimate the number of records of an epoch, with the held-out ones spread evenly over the sources.

    Args:
        counts: Number of records of each source.
        held_out: Number of held-out records of all sources.
        data: The stage's data, with the weights of the sources.
    """
    total = sum(counts)
    kept = 1 - held_out / total if total else 1.0
    weights = [source.weight for source in sources_of(data)]
    if all(weight == 1 for weight in weights):
        return total - held_out
    return sum(max(1, round(weight * count * kept)) for weight, count in zip(weights, counts, strict=True) if count)
