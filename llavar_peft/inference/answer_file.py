"""Answer a file of questions: in batches, resumable, with one process or several.

Source: LLaVAR, llava/eval/model_vqa.py (one question at a time, one file per process).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from torch import distributed

from llavar_peft.atomic_files import check_output_file, hold_lock
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.json_schema import AnswerSchema
from llavar_peft.errors import DataError, Fault, ImageError
from llavar_peft.inference.batch_decoder import DecodingBatch, Row
from llavar_peft.inference.chat import Chat, SchemaInput, load_chat
from llavar_peft.inference.generation_request import Request
from llavar_peft.inference.question_file import (
    AnswerJournal,
    ImageQuestion,
    earlier_answers,
    read_question_file,
    write_answer_file,
)
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.launch_environment import claim_device, uses_gpu
from llavar_peft.types import BadImagePolicy, ImageMode, Quantization, expand_home
from llavar_peft.weights.adapter.model_hash import identify_model

logger = logging.getLogger(__name__)

_SHOWN = 20  # missing images in a message
_TIMEOUT = timedelta(days=30)  # waiting for the slowest process; the launcher notices one that dies


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReport:
    """The result of ``generate_answers``.

    Attributes:
        answers: The file.
        count: Number of answers in it.
        kept: Number of these that earlier runs gave.
        skipped: Messages about the images of skipped questions.
        seconds: Wall time of answering, without loading the model.
    """

    answers: Path
    count: int
    kept: int
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Process:
    """This process among those of the launcher, and the number of them."""

    rank: int
    size: int

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()

    @property
    def device(self) -> str:
        """The GPU of this process."""
        return str(claim_device()) if self.size > 1 and uses_gpu() else "auto"


def generate_answers(  # noqa: PLR0913 - a run's settings, by name
    model: str | Path,
    questions: str | Path,
    images: str | Path | None,
    answers: str | Path,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    adapter: str | Path | None = None,
    vision_tower: str | None = None,
    quantize: Quantization | None = None,
    image_mode: ImageMode | None = None,
    schema: SchemaInput | None = None,
    on_bad_image: BadImagePolicy = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> GenerateReport:
    """Answer a file of questions. An interrupted run resumes, and questions that were added are answered.

    Under ``accelerate launch`` or ``torchrun`` each process answers a share and the first one joins them; the file does
    not depend on the number of processes.

    Args:
        model: As in ``load_chat``.
        questions: JSON lines with ``question_id``, ``text`` and optionally ``image``.
        images: Root folder of the images; None if no question has one.
        answers: The file to write, in the order of the questions.
        sampling: How answers are sampled. With a seed, the seed of a question is the seed plus its index.
        batch_size: Maximum number of questions in a batch. Greedy answers in float32 do not depend on it; at half
            precision or quantized, rounding differs between batches and can change a close choice.
        adapter: Folder of an adapter.
        vision_tower: Folder or name of the tower, for a checkpoint in the released layout.
        quantize: How the language model's linear layers are stored.
        image_mode: Overrides the model's ``inference_image_mode``.
        schema: What all answers have to follow, as in ``Chat.ask``.
        on_bad_image: Whether a missing or broken image stops the run or skips its question.
        progress: Called with the number of questions done and in total, of this process.

    Raises:
        ConfigError: There are no questions, or the files belong to another run.
        DataError: A line is not a question.
        EnvironmentFaultError: The disk is full, the folder is not writable, or another process writes the answers.
        ImageError: An image is missing, broken or outside the folder.
    """
    question_list = read_question_file(expand_home(questions))
    path, sampling = expand_home(answers), sampling or Sampling()
    roots = ImageRoots([] if images is None else [images])
    name = str(model) if adapter is None else f"{model}+{adapter}"
    answer_schema = None if schema is None else AnswerSchema.of(schema)
    settings: dict[str, Any] = {
        "questions": hashlib.sha256(expand_home(questions).read_bytes()).hexdigest(),
        "images": None if images is None else str(expand_home(images).resolve()),
        "model": name,
        "weights": identify_model(model, adapter) if expand_home(model).is_dir() else None,
        "vision_tower": vision_tower,
        "quantize": quantize,
        "image_mode": image_mode,
        "sampling": {**dataclasses.asdict(sampling), "stop": list(sampling.stop)},
        **({} if answer_schema is None else {"schema": answer_schema.text}),
    }
    check_output_file(path, "--answers")
    with _join_processes() as process, _lock_answers(path, process):
        journal = AnswerJournal(path, process.rank)
        earlier = [] if journal.begun or not path.is_file() else earlier_answers(path, question_list, name)
        if earlier and len(earlier) == len(question_list):
            if process.rank == 0:
                journal.remove()  # left by a run that was killed while removing it
            return GenerateReport(answers=path, count=len(earlier), kept=len(earlier))
        if process.rank == 0:
            _begin(journal, settings, earlier, path)
        process.wait()
        entries_before = journal.read()
        todo = [question for question in _share(question_list, process) if question.place not in entries_before]
        if on_bad_image == "stop":
            _check_images(todo, roots)
        started = time.perf_counter()
        if todo:
            chat = load_chat(model, adapter, vision_tower=vision_tower, quantize=quantize, device=process.device)
            started = time.perf_counter()
            worker = _Worker(chat, roots, sampling, image_mode, on_bad_image, answer_schema)
            with journal:
                worker.run(todo, batch_size, journal, progress)
        process.wait()
        entries = journal.read()
        seconds = time.perf_counter() - started
        if process.rank == 0:
            write_answer_file(path, question_list, entries, name)
        process.wait()
        if process.rank == 0:
            journal.remove()
    return GenerateReport(
        answers=path,
        count=sum("text" in entry for entry in entries.values()),
        kept=sum("text" in entry for entry in entries_before.values()),
        skipped=tuple(entry["skipped"] for entry in entries.values() if "skipped" in entry),
        seconds=seconds,
    )


def _begin(journal: AnswerJournal, settings: dict[str, Any], earlier: list[dict[str, Any]], path: Path) -> None:
    """Begin the journal of a run, with the answers that an existing answer file has."""
    if earlier:
        logger.warning(
            "%s: keeping its %d answers, which may have been sampled with other settings", path, len(earlier)
        )
    journal.begin(settings, earlier)


@contextmanager
def _join_processes() -> Iterator[_Process]:
    """Join the other processes of the launcher, if any."""
    process = _Process(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if process.size == 1:
        yield process
        return
    distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield process
    finally:
        distributed.destroy_process_group()


def _lock_answers(path: Path, process: _Process) -> AbstractContextManager[None]:
    """Return a lock on the answer file, which the first process holds for all."""
    return hold_lock(path.with_name(f".{path.name}.lock"), where=path) if process.rank == 0 else nullcontext()


def _share(questions: Sequence[ImageQuestion], process: _Process) -> list[ImageQuestion]:
    """Return the questions of a process, longest first: batches have similar lengths, and memory errors come early."""
    longest_first = sorted(questions, key=lambda question: (question.image is None, -len(question.text)))
    return longest_first[process.rank :: process.size]


def _check_images(questions: Sequence[ImageQuestion], roots: ImageRoots) -> None:
    faults: list[Fault] = []
    for question in questions:
        try:
            question.find_image(roots)
        except ImageError as error:
            faults += [Fault(f"{question.where}: {fault.where}", fault.what, fault.fix) for fault in error.faults]
    if faults:
        more = f"\n... and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ImageError("\n".join(map(str, faults[:_SHOWN])) + more, faults)


@dataclass(frozen=True, slots=True)
class _Worker:
    """Answers the questions of one process."""

    chat: Chat
    roots: ImageRoots
    sampling: Sampling
    image_mode: ImageMode | None
    on_bad_image: BadImagePolicy
    schema: AnswerSchema | None

    def run(
        self,
        questions: Sequence[ImageQuestion],
        batch_size: int,
        journal: AnswerJournal,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Answer questions. Half a batch is prepared in advance and joins as soon as other rows end."""
        batch = DecodingBatch(self.chat.engine, self.chat.resolve_adapter(...))
        places: dict[Row, int] = {}
        num_done = 0
        chunk_size = max(1, batch_size // 2)
        chunks = iter([questions[start : start + chunk_size] for start in range(0, len(questions), chunk_size)])
        with ThreadPoolExecutor(max_workers=2) as pool:
            prepared = deque(pool.submit(self._prepare, chunk) for chunk in islice(chunks, 2))
            while prepared or batch.rows:
                entries: list[dict[str, Any]] = []
                while prepared and len(batch.rows) + chunk_size <= batch_size:
                    rows, skipped = prepared.popleft().result()
                    prepared += [pool.submit(self._prepare, chunk) for chunk in islice(chunks, 1)]
                    places.update(rows)
                    entries += skipped
                    batch.join(list(rows))
                batch.step()
                for row, place in list(places.items()):
                    if row.answer is not None:
                        entries.append({"place": place, "text": row.answer.text})
                        del places[row]
                journal.write(entries)
                num_done += len(entries)
                if entries and progress is not None:
                    progress(num_done, len(questions))

    def _prepare(self, questions: Sequence[ImageQuestion]) -> tuple[dict[Row, int], list[dict[str, Any]]]:
        """Return rows with the index of their question, and entries for skipped questions."""
        rows: dict[Row, int] = {}
        skipped = []
        for question in questions:
            try:
                rows[Row(self._request(question), self.chat.engine)] = question.place
            except (ImageError, DataError) as error:
                what = f"{question.where}: {error}"
                if self.on_bad_image == "stop" or isinstance(error, DataError):
                    raise type(error)(what, error.faults) from error
                logger.warning("skipped: %s", what)
                skipped.append({"place": question.place, "skipped": what})
        return rows, skipped

    def _request(self, question: ImageQuestion) -> Request:
        sampling = self.sampling
        if sampling.seed is not None:
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + question.place) % 2**63)
        image = question.find_image(self.roots)
        return self.chat.request(
            image, question.text, image_mode=self.image_mode, sampling=sampling, schema=self.schema
        )
