"""Write records of any accepted form as the released format: ``id``, ``image``, ``conversations``.

Images that the records contain become files with the same bytes; paths of images stay as they are. A record that the
released format cannot express, because it has a system message or a text that says ``<image>`` and means it, is
written with ``messages``, so that all records train as before.

The file and the folder appear when everything is written; until then they have temporary names.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from llavar_peft.atomic_files import (
    check_output_file,
    commit_folder,
    disk_errors,
    dump_json,
    hold_lock,
    replace_file,
    staging_path,
)
from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.image_files import image_suffix
from llavar_peft.data.message_records import as_record
from llavar_peft.data.pdf_pages import page_name, split_page
from llavar_peft.data.record_store import RecordSource, parse_record, text_without_images
from llavar_peft.data.text_size import SIZE_KEYS
from llavar_peft.errors import ConfigError, DataError, Fault, ImageError, count_of
from llavar_peft.types import Conversation, EmbeddedImage, ImageSource, Turn

_MARK: Final = ".llavar-peft-convert"
"""A file in a folder of images that says that the folder may be replaced."""
_MOST_FAULTS: Final = 10
_REPORTED: Final = 64  # records between two reports of the progress
_LONGEST_NAME: Final = 80  # characters of a file name, without its extension
_UNSAFE: Final = re.compile(r"[^\w.-]+")
_RESERVED: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows


@dataclass(frozen=True, slots=True)
class ConvertedRecords:
    """What was written.

    Attributes:
        records: Number of records.
        grouped: Number of records of the source that became further turns of another one.
        messages: Number of records that are written as ``messages``.
        left_out: Number of faulty records that were left out.
        images: The folder of the images that were written; None if there were none.
        files: Number of these images.
    """

    records: int
    grouped: int
    messages: int
    left_out: int
    images: Path | None
    files: int


def convert_records(
    source: RecordSource,
    out: Path,
    images: Path | None = None,
    *,
    group_by_image: bool = False,
    skip_faulty: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertedRecords:
    """Write records in the released format.

    Args:
        source: The records.
        out: The file: a list (``.json``), or one record per line (``.jsonl``).
        images: Folder for the images that the records contain; None is ``<name of the file>_images`` beside it.
        group_by_image: Whether records with the same images become turns of one record.
        skip_faulty: Whether faulty records are left out; otherwise nothing is written if there are any.
        overwrite: Whether an existing file, and a folder that this function wrote, are replaced.
        progress: Called with the number of records that were read and in total.

    Raises:
        ConfigError: The file or the folder exists already, or the file has another extension.
        DataError: Records are faulty.
        EnvironmentFaultError: A file cannot be written, or another process is writing it.
    """
    out = Path(os.path.abspath(out))
    folder = _ImageFolder(Path(os.path.abspath(images or out.with_name(f"{out.stem}_images"))), overwrite)
    _check_output(out, folder.path, overwrite)
    faults: list[Fault] = []
    counts = {"records": 0, "messages": 0, "left_out": 0}
    with disk_errors(out, only_full=True), hold_lock(out.with_name(f".{out.name}.lock"), where=out), folder:
        groups = _groups(source) if group_by_image else [[index] for index in range(len(source))]
        with replace_file(out) as staged, disk_errors(out):
            with staged.open("w", encoding="utf-8", newline="\n") as file:
                for record, used in _records(source, groups, folder, faults, skip_faulty, progress):
                    if record is None:
                        counts["left_out"] += used
                        continue
                    before = "" if out.suffix == ".jsonl" else ",\n" if counts["records"] else "[\n"
                    file.write(f"{before}{dump_json(record)}" + ("\n" if out.suffix == ".jsonl" else ""))
                    counts["records"] += 1
                    counts["messages"] += "messages" in record
                file.write("" if out.suffix == ".jsonl" else "\n]\n")
                file.flush()
                os.fsync(file.fileno())
            _check_faults(faults, counts["records"], len(source), skip_faulty)
            folder.commit()
    written = folder.path if folder.count else None
    grouped = len(source) - counts["left_out"] - counts["records"]
    return ConvertedRecords(**counts, grouped=grouped, images=written, files=folder.count)


def _check_output(out: Path, folder: Path, overwrite: bool) -> None:
    check_output_file(out, "--out")
    if out.suffix not in (".json", ".jsonl"):
        raise ConfigError.at("--out", f"is no file of records (got {out.name!r})", "end the name in .json or .jsonl")
    if out.exists() and not overwrite:
        raise ConfigError.at("--out", f"{out} exists already", "choose another file, or add --overwrite")
    if folder == out.parent or folder in out.parents:
        raise ConfigError.at("--images", f"{folder} would contain {out.name}", "choose a folder for the images alone")
    if folder.exists() and not folder.is_dir():
        raise ConfigError.at("--images", f"{folder} is a file, expected a folder", "choose another folder")


def _check_faults(faults: Sequence[Fault], written: int, total: int, skip_faulty: bool) -> None:
    if faults and not skip_faulty:
        listed = "\n".join(str(fault) for fault in faults[:_MOST_FAULTS])
        more = " and maybe more" if len(faults) >= _MOST_FAULTS else ""
        fix = "Fix: correct the records, or leave them out with --skip-faulty."
        raise DataError(f"{count_of(len(faults), 'fault')}{more}, nothing was written\n{listed}\n{fix}", faults)
    if not written:
        what = f"no record can be converted (got {count_of(total, 'faulty record')})"
        raise DataError.at("records", what, "correct what 'llavar-peft data check' lists")


class _ImageFolder:
    """Writes images to a temporary folder, each once, under names that no other one has."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path = path
        self.count = 0
        self._overwrite = overwrite
        self._staged = staging_path(path)
        self._names: dict[bytes, str] = {}
        self._taken: dict[str, int] = {}

    def __enter__(self) -> None:
        shutil.rmtree(self._staged, ignore_errors=True)  # of a process that was ended

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._staged, ignore_errors=True)

    def add(self, image: EmbeddedImage, record_id: str) -> str:
        """Write an image, and return its name in the folder, with the page of a PDF document.

        Args:
            image: The image.
            record_id: Names an image without a path.
        """
        digest = hashlib.sha256(image.data).digest()
        path, page = split_page(image.path or record_id)
        if digest not in self._names:
            self._names[digest] = self._write(image, path)
        name = self._names[digest]
        return name if page is None else page_name(name, page)

    def _write(self, image: EmbeddedImage, path: str) -> str:
        data = bytes(image.data)
        suffix = image_suffix(data, image.name)
        stem = _safe_stem(path)
        name = f"{stem}{suffix}"
        while name.casefold() in self._taken:
            self._taken[f"{stem}{suffix}".casefold()] += 1
            name = f"{stem}-{self._taken[f'{stem}{suffix}'.casefold()]}{suffix}"
        if not self.count:
            self._check_unused()
            self._staged.mkdir(parents=True)
        (self._staged / name).write_bytes(data)
        self._taken[name.casefold()] = 1
        self.count += 1
        return name

    def commit(self) -> None:
        """Give the folder its name, if it has images."""
        if self.count:
            (self._staged / _MARK).write_text("Written by llavar-peft data convert, which may replace this folder.\n")
            commit_folder(self._staged, self.path)

    def _check_unused(self) -> None:
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not (self.path / _MARK).exists():
            what = f"{self.path} is not empty, and the records contain images that have to be written"
            raise ConfigError.at("--images", what, "choose another folder")
        if not self._overwrite:
            raise ConfigError.at("--images", f"{self.path} exists already", "choose another folder, or add --overwrite")


def _safe_stem(text: str) -> str:
    """Return a file name without its extension, from a path or an id of any source."""
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", text))[-1]
    stem = re.sub(r"\.\w{2,5}$", "", last)
    safe = _UNSAFE.sub("_", stem).strip("._-")[:_LONGEST_NAME]
    return f"image-{safe}" if not safe or _RESERVED.fullmatch(safe) else safe


def _records(
    source: RecordSource,
    groups: Sequence[Sequence[int]],
    folder: _ImageFolder,
    faults: list[Fault],
    skip_faulty: bool,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """Yield the record to write of each group, None for a faulty one, and the group's number of records.

    What is wrong is added to ``faults``.
    """
    done = 0
    for number, group in enumerate(groups, 1):
        if len(faults) >= _MOST_FAULTS and not skip_faulty:
            return
        yield _record(source, group, folder, faults), len(group)
        done += len(group)
        if progress is not None and (number % _REPORTED == 0 or done == len(source)):
            progress(done, len(source))


def _record(
    source: RecordSource, group: Sequence[int], folder: _ImageFolder, faults: list[Fault]
) -> dict[str, Any] | None:
    where = source.where(group[0])
    try:
        raw = source[group[0]]
        conversation = parse_record(raw, where)
        for index in group[1:]:
            conversation = _joined(conversation, parse_record(source[index], source.where(index)))
        names = [
            image if isinstance(image, str) else folder.add(image, conversation.id) for image in conversation.images
        ]
    except ImageError as error:
        faults += [Fault(f"{where}: {fault.where}", fault.what, fault.fix) for fault in error.faults]
        return None
    except DataError as error:
        faults += error.faults
        return None
    record = as_record(_plain(conversation), names)
    if len(names) == 1:
        record["image"] = names[0]
    return {**record, **{key: raw[key] for key in SIZE_KEYS if raw.get(key) is not None}}


def _plain(conversation: Conversation) -> Conversation:
    """Return a conversation whose images are marked in its texts, if no text says ``<image>`` and means it."""
    literal = any(IMAGE_PLACEHOLDER in part for turn in conversation.turns for part in turn.parts or () if part)
    if literal:
        return conversation
    return replace(conversation, turns=tuple(replace(turn, parts=None) for turn in conversation.turns))


def _groups(source: RecordSource) -> list[list[int]]:
    """Return the indices of the records, those with the same images together."""
    groups: dict[Any, list[int]] = {}
    for index in range(len(source)):
        try:
            conversation = parse_record(source[index], source.where(index))
        except DataError:
            groups[index] = [index]  # which is reported when it is written
            continue
        key = (tuple(map(_identity, conversation.images)), conversation.system)
        alone = not conversation.images or conversation.turns[-1].role == "human"
        groups.setdefault(index if alone else key, []).append(index)
    return list(groups.values())


def _identity(image: ImageSource) -> str | bytes:
    return image if isinstance(image, str) else hashlib.sha256(image.data).digest()


def _joined(first: Conversation, other: Conversation) -> Conversation:
    """Return the turns of two conversations about the same images, which are shown once."""
    added = tuple(Turn(turn.role, text_without_images(turn)) if turn.role == "human" else turn for turn in other.turns)
    return replace(first, turns=(*first.turns, *added))
