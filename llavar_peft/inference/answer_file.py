"""A file of questions to a file of answers: in batches, resumable, by one process or several.

Source: LLaVAR, llava/eval/model_vqa.py (there one question at a time, each process a file of its own).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.errors import DataError, Fault, ImageError
from llavar_peft.inference.batch_decoder import DecodingBatch, Row
from llavar_peft.inference.chat import Chat, load_chat
from llavar_peft.inference.generation_request import Request
from llavar_peft.inference.question_file import (
    AnswerJournal,
    ImageQuestion,
    earlier_answers,
    read_question_file,
    write_answer_file,
)
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.recipe.schema import BadImagePolicy, Quantization
from llavar_peft.types import ImageMode
from llavar_peft.weights.model_hash import identify_model

logger = logging.getLogger(__name__)

_SHOWN = 20  # images that are named
_LONG_WAIT = timedelta(days=30)  # for the slowest process; one that dies is noticed by the launcher


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReport:
    """What came out.

    Attributes:
        answers: The file.
        count: Answers in it.
        kept: Of these, those that earlier runs gave.
        skipped: What was wrong with images that were passed over.
        seconds: Wall time of answering, the model's loading not included.
    """

    answers: Path
    count: int
    kept: int
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Processes:
    rank: int
    size: int

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()

    @property
    def device(self) -> str:
        """Each process has its GPU."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if self.size > 1 and torch.cuda.is_available() else "auto"


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
    on_bad_image: BadImagePolicy = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> GenerateReport:
    """Answer a file of questions. Run again, it goes on where it was stopped, or with questions that were added.

    Under ``accelerate launch`` or ``torchrun`` each process answers a share, and the first joins them: the file is the
    same as one process's.

    Args:
        model: As ``load_chat`` takes it.
        questions: JSON lines with ``question_id``, ``text`` and perhaps ``image``.
        images: The folder that images' paths start from, and may not leave; None if no question has one.
        answers: The file to write, in the order of the questions.
        sampling: How answers are drawn; of a seed, each question gets one of its own.
        batch_size: Rows at most that are answered at a time. In float32 greedy answers do not depend on it; at half
            precision or quantized, sums round otherwise in another batch, and close calls may fall the other way.
        adapter: An adapter's folder.
        vision_tower: Where the tower is, for a checkpoint in the released layout.
        quantize: How the language model's linear layers are stored.
        image_mode: Instead of the model's own ``inference_image_mode``.
        on_bad_image: What a missing or broken image does: ``"stop"`` the run, or ``"skip"`` its question.
        progress: Called with the questions done and all of them, of this process.

    Returns:
        Where the answers are, and how many.

    Raises:
        ConfigError: No question, or files of another run.
        DataError: Lines that are no questions.
        ImageError: An image is missing, broken or outside the folder.
    """
    asked = read_question_file(Path(questions))
    path, sampling = Path(answers), sampling or Sampling()
    roots = ImageRoots([] if images is None else [images])
    name = str(model) if adapter is None else f"{model}+{adapter}"
    settings: dict[str, Any] = {
        "questions": hashlib.sha256(Path(questions).read_bytes()).hexdigest(),
        "images": None if images is None else str(Path(images).resolve()),
        "model": name,
        "weights": identify_model(model, adapter) if Path(model).is_dir() else None,
        "vision_tower": vision_tower,
        "quantize": quantize,
        "image_mode": image_mode,
        "sampling": {**dataclasses.asdict(sampling), "stop": list(sampling.stop)},
    }
    with _processes() as here:
        journal = AnswerJournal(path, here.rank)
        earlier: list[dict[str, Any]] = []
        if path.is_file() and not journal.begun:
            earlier = earlier_answers(path, asked, name)
            if len(earlier) == len(asked):
                return GenerateReport(answers=path, count=len(earlier), kept=len(earlier))
        if here.rank == 0:
            if earlier:
                logger.warning("%s: its %d answers are kept, however they were sampled", path, len(earlier))
            journal.begin(settings, earlier)
        here.wait()
        before = journal.read()
        todo = [question for question in _share(asked, here) if question.place not in before]
        if on_bad_image == "stop":
            _check_images(todo, roots)
        began = time.perf_counter()
        if todo:
            chat = load_chat(model, adapter, vision_tower=vision_tower, quantize=quantize, device=here.device)
            began = time.perf_counter()
            work = _Work(chat, roots, sampling, image_mode, on_bad_image)
            with journal:
                work.run(todo, batch_size, journal, progress)
        here.wait()
        done = journal.read()
        seconds = time.perf_counter() - began
        count = sum("text" in entry for entry in done.values())
        if here.rank == 0:
            write_answer_file(path, asked, done, name)
        here.wait()
        if here.rank == 0:
            journal.remove()
    skipped = tuple(entry["skipped"] for entry in done.values() if "skipped" in entry)
    kept = sum("text" in entry for entry in before.values())
    return GenerateReport(answers=path, count=count, kept=kept, skipped=skipped, seconds=seconds)


@contextmanager
def _processes() -> Iterator[_Processes]:
    """Which of the processes that a launcher started this is."""
    here = _Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if here.size == 1:
        yield here
        return
    distributed.init_process_group("gloo", timeout=_LONG_WAIT)
    try:
        yield here
    finally:
        distributed.destroy_process_group()


def _share(questions: Sequence[ImageQuestion], here: _Processes) -> list[ImageQuestion]:
    """A process's share, longest first: neighbours are of a length, and what does not fit is seen at once."""
    longest = sorted(questions, key=lambda question: (question.image is None, -len(question.text)))
    return longest[here.rank :: here.size]


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
class _Work:
    """One process's answering."""

    chat: Chat
    roots: ImageRoots
    sampling: Sampling
    image_mode: ImageMode | None
    on_bad_image: BadImagePolicy

    def run(
        self,
        questions: Sequence[ImageQuestion],
        batch_size: int,
        journal: AnswerJournal,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Answer questions; half a batch of rows is always prepared in advance, and joins as soon as others end."""
        batch = DecodingBatch(self.chat.engine, self.chat.resolve_adapter(...))
        places: dict[Row, int] = {}
        done = 0
        chunk = max(1, batch_size // 2)
        with ThreadPoolExecutor(max_workers=2) as pool:
            parts = iter([questions[start : start + chunk] for start in range(0, len(questions), chunk)])
            ahead = [pool.submit(self._prepare, part) for part in islice(parts, 2)]
            while ahead or batch.rows:
                entries: list[dict[str, Any]] = []
                while ahead and len(batch.rows) + chunk <= batch_size:
                    rows, skipped = ahead.pop(0).result()
                    ahead += [pool.submit(self._prepare, part) for part in islice(parts, 1)]
                    places.update(rows)
                    entries += skipped
                    batch.join(list(rows))
                batch.step()
                for row, place in list(places.items()):
                    if row.answer is not None:
                        entries.append({"place": place, "text": row.answer.text})
                        del places[row]
                journal.write(entries)
                done += len(entries)
                if entries and progress is not None:
                    progress(done, len(questions))

    def _prepare(self, questions: Sequence[ImageQuestion]) -> tuple[dict[Row, int], list[dict[str, Any]]]:
        """Rows with their questions' places, and entries for what is skipped."""
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
        return self.chat.request(image, question.text, image_mode=self.image_mode, sampling=sampling)
