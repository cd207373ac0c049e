"""Records and their images as one Parquet table, which ``hf://owner/name`` reads back and the hub shows."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from llavar_peft.atomic_files import disk_fault
from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.image_files import open_image
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.message_records import as_record
from llavar_peft.data.pdf_pages import PdfDocument, locate_page
from llavar_peft.data.record_store import open_filled_records, parse_record
from llavar_peft.errors import DataError, ImageError, LlavarError, count_of
from llavar_peft.types import Conversation, EmbeddedImage, Turn

Form = Literal["conversations", "texts", "parts"]
_FILE_BYTES = 500_000_000
"""Approximate size of a file of the table. Source: ``datasets``' default for ``push_to_hub``, 500 MB."""
_ROLES = {"human": "user", "gpt": "assistant"}


def write_table(source: str | Path, images: Sequence[str | Path], folder: Path) -> tuple[int, int]:
    """Write records and their images as Parquet files into a folder.

    Args:
        source: The file of the records.
        images: Folders of their images.
        folder: An existing folder, in which ``data/train-*.parquet`` is written.

    Returns:
        The numbers of records and of images.

    Raises:
        DataError: A record is faulty.
        ImageError: An image is missing, or a page of a document cannot be rendered.
        EnvironmentFaultError: The disk is full.
    """
    from datasets import Dataset, Features, Image, Value
    from datasets.exceptions import DatasetGenerationError

    opened = open_filled_records([str(source)])
    roots = ImageRoots([str(one) for one in images] or [str(Path(source).parent)])
    conversations = [parse_record(opened[number], opened.where(number)) for number in range(len(opened))]
    paths = [[_find(roots, one, opened.where(n)) for one in each.images] for n, each in enumerate(conversations)]
    form = _choose_form(conversations, opened.where)
    text: Any = Value("string")
    column: dict[str, Any] = {
        "conversations": {"conversations": [{"from": text, "value": text}]},
        "texts": {"messages": [{"role": text, "content": text}]},
        "parts": {"messages": [{"role": text, "content": [{"type": text, "text": text}]}]},
    }[form]

    def rows() -> Iterator[dict[str, Any]]:
        for conversation, found in zip(conversations, paths, strict=True):
            record = as_record(conversation, []) if form == "conversations" else _as_messages(conversation, form)
            yield {**record, "images": [_embed(one) for one in found]}

    features = Features({"id": Value("string"), **column, "images": [Image(decode=False)]})
    size = sum(_size_of(one) for each in paths for one in each)
    try:
        table = Dataset.from_generator(rows, features=features, cache_dir=str(folder / ".cache"))
    except DatasetGenerationError as error:  # from an error of ours, or of the disk
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, LlavarError):
            raise disk_fault(folder, error.__cause__, needed=size) from error
        raise error.__cause__ or error from None
    count = min(len(table), max(1, math.ceil(size / _FILE_BYTES)))
    (folder / "data").mkdir()
    for number in range(count):
        shard = table.shard(count, number, contiguous=True)
        shard.to_parquet(str(folder / "data" / f"train-{number:05d}-of-{count:05d}.parquet"))
    return len(table), sum(map(len, paths))


def describe_table(records: int, images: int) -> str:
    """Return the size of a table in words."""
    return f"{count_of(records, 'record')} with {count_of(images, 'image')}"


def _find(roots: ImageRoots, image: str | EmbeddedImage, where: str) -> Path | EmbeddedImage:
    try:
        return image if isinstance(image, EmbeddedImage) else roots.resolve(image)
    except LlavarError as error:
        raise type(error)(f"{where}: {error}", error.faults) from error


def _embed(image: Path | EmbeddedImage) -> dict[str, Any]:
    if isinstance(image, EmbeddedImage):
        return {"bytes": bytes(image.data), "path": None if image.path is None else Path(image.path).name}
    file, page = locate_page(str(image))
    try:
        if PdfDocument.of(file, str(image)) is None:
            return {"bytes": image.read_bytes(), "path": image.name}
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise ImageError.at(str(image), what, "check the file's permissions") from error
    # A page as an image: the whole document would be in the table, also the pages that no record names.
    buffer = io.BytesIO()
    open_image(image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{Path(file).stem}-page-{page or 1}.png"}


def _size_of(image: Path | EmbeddedImage) -> int:
    """Return the size of an image's file, for a page of a document that of the whole document."""
    return len(image.data) if isinstance(image, EmbeddedImage) else Path(locate_page(str(image))[0]).stat().st_size


def _choose_form(conversations: Sequence[Conversation], where: Callable[[int], str]) -> Form:
    """Return the column that can hold all records: a table has one type in each."""
    if any(turn.parts is not None for each in conversations for turn in each.turns):
        for number, each in enumerate(conversations):
            if any(turn.parts is None and IMAGE_PLACEHOLDER in turn.text for turn in each.turns):
                raise DataError.at(
                    where(number),
                    f"marks its images by {IMAGE_PLACEHOLDER} in a text, and other records give them apart from texts",
                    "push the two kinds of records as two data sets",
                )
        return "parts"
    return "conversations" if all(each.system is None for each in conversations) else "texts"


def _as_messages(conversation: Conversation, form: Form) -> dict[str, Any]:
    def content(turn: Turn) -> str | list[dict[str, str | None]]:
        if form == "texts":
            return turn.text
        parts = (turn.text,) if turn.parts is None else turn.parts
        return [{"type": "image", "text": None} if one is None else {"type": "text", "text": one} for one in parts]

    messages = [{"role": _ROLES[turn.role], "content": content(turn)} for turn in conversation.turns]
    if conversation.system is not None:
        system = Turn("human", conversation.system, (conversation.system,))
        messages.insert(0, {"role": "system", "content": content(system)})
    return {"id": conversation.id, "messages": messages}
