"""Write rows that can only be read one after the other to one Arrow file in the cache, and read that at random.

Training needs the number of the records and each of them by its index: for an order that depends on (seed, epoch)
alone, for steps of even length, for the held-out records, and to resume with the same batches. A stream has none of
these; shuffled through a buffer, it repeats its order only from the start. So a stream is read once, some rows at a
time, and the file is used from then on, also by later runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from llavar_peft.atomic_files import disk_errors, lock_file, replace_file
from llavar_peft.errors import DataError

_ROWS: Final = 64  # of a batch of a stream, which is all that is in memory


def store_stream(stream: Any, key: Sequence[Any], where: str, cache_dir: str | Path | None) -> Any:
    """Return the rows of a stream as a memory-mapped ``datasets.Dataset``.

    Args:
        stream: A ``datasets.IterableDataset``.
        key: JSON values that identify the rows.
        where: Name of the data set in messages.
        cache_dir: Folder of the file; None is the user's cache folder.

    Raises:
        DataError: The stream has no rows.
        EnvironmentFaultError: The disk is full.
    """
    return store_batches(stream.with_format("arrow").iter(batch_size=_ROWS), key, where, cache_dir)


def store_batches(batches: Iterable[Any], key: Sequence[Any], where: str, cache_dir: str | Path | None) -> Any:
    """Return the rows of Arrow tables as ``store_stream`` does. The tables are not read if the file exists."""
    from datasets import Dataset

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llavar_peft"
    folder = Path(cache_dir) if cache_dir is not None else home
    path = folder / f"stream-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.arrow"
    if not path.is_file():
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.with_suffix(".lock").open("ab")
        with lock, disk_errors(path, only_full=True):  # other errors are those of the source
            lock_file(lock.fileno(), wait=True)  # of several processes one reads the source
            if not path.is_file():
                _write(batches, path, where)
    return Dataset.from_file(str(path))


def _write(batches: Iterable[Any], path: Path, where: str) -> None:
    import pyarrow as pa
    from tqdm import tqdm

    writer: Any = None
    schema: Any = None
    with replace_file(path) as staged, staged.open("wb") as file, tqdm(desc=where, unit=" records", delay=1) as bar:
        for batch in batches:
            if writer is None:
                schema = batch.schema
                writer = pa.ipc.new_stream(file, schema)
            writer.write_table(batch.cast(schema))
            bar.update(len(batch))
        if writer is None:
            raise DataError.at(where, "no records", "give a data set with at least one record")
        writer.close()
        file.flush()
        os.fsync(file.fileno())
