"""The probe: evaluates held-out records during training by their loss and by the answers to a few images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llavar_peft.atomic_files import disk_errors, write_bytes
from llavar_peft.constants import PROBE_FILE
from llavar_peft.data.record_store import parse_record, text_without_images
from llavar_peft.data.text_metrics import character_accuracy, exact_match, is_blank
from llavar_peft.data.training_dataset import Collator, TrainingDataset
from llavar_peft.errors import ImageError
from llavar_peft.inference.chat import Chat
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.schema import ProbeConfig
from llavar_peft.training.run_files import append_line
from llavar_peft.training.supervised_loss import supervised_loss
from llavar_peft.types import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

_THUMBNAIL = (480, 480)


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """A held-out image with its first question and answer.

    Attributes:
        id: Id of the record.
        index: Index of the record.
        image: The image.
        question: The question, without the place of the image.
        truth: The answer of the record.
        system: The record's system message; None without one.
    """

    id: str
    index: int
    image: ImageSource
    question: str
    truth: str
    system: str | None = None


class Probe:
    """Evaluates held-out records. Every rank takes part, since a sharded model needs all of them; rank 0 writes.

    Args:
        config: The numbers of records and images, and the limit of tokens.
        held_out: Records that are not trained on.
        processor: The model's processor.
        directory: Folder of the stage, for ``probe.jsonl`` and ``probe/``.
        batch_size: Number of records per forward pass.
        writes: Whether this rank writes.
    """

    def __init__(
        self,
        config: ProbeConfig,
        held_out: TrainingDataset,
        processor: LlavarProcessor,
        directory: Path,
        *,
        batch_size: int,
        writes: bool,
    ) -> None:
        self.config = config
        self.held_out = held_out
        self.processor = processor
        self.directory = directory
        self.batch_size = batch_size
        self.writes = writes
        self.questions = self._choose_questions()

    def run(self, model: nn.Module, *, step: int, when: Literal["start", "step", "end"]) -> dict[str, Any]:
        """Evaluate the model and append a line to ``probe.jsonl``.

        Args:
            model: The model in training, possibly wrapped; its mode is restored afterwards.
            step: Number of optimizer steps done.
            when: The occasion, for the line.

        Returns:
            The line.
        """
        training = model.training
        model.eval()
        try:
            loss = self._loss(model)
            line: dict[str, Any] = {"step": step, "when": when, "held_out_loss": loss, **self._answer_questions(model)}
        finally:
            model.train(training)
        if self.writes:
            with disk_errors(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            append_line(self.directory / PROBE_FILE, line)
        return line

    def _choose_questions(self) -> list[ProbeQuestion]:
        """Return the first held-out records that have one readable image, a question and an answer."""
        chosen: list[ProbeQuestion] = []
        for index in self.held_out.indices.tolist():
            if len(chosen) == self.config.images:
                break
            conversation = parse_record(self.held_out.records[index], f"record {index}")
            if len(conversation.images) != 1 or len(conversation.turns) < 2 or is_blank(conversation.turns[1].text):
                continue
            try:
                self.held_out.roots_of(index).open(conversation.images[0])
            except ImageError:
                continue
            question_turn, answer_turn = conversation.turns[:2]
            chosen.append(
                ProbeQuestion(
                    id=conversation.id,
                    index=index,
                    image=conversation.images[0],
                    question=text_without_images(question_turn),
                    truth=answer_turn.text.strip(),
                    system=conversation.system,
                )
            )
        return chosen

    def _open(self, question: ProbeQuestion) -> Image:
        return self.held_out.roots_of(question.index).open(question.image)

    def _loss(self, model: nn.Module) -> float | None:
        """Return the mean cross entropy per supervised token."""
        collate = Collator(self.processor.tokenizer.pad_token_id, image_token_id=self.processor.image_token_id)
        device = next(model.parameters()).device
        count = min(len(self.held_out), self.config.loss_records)
        total, tokens = 0.0, 0
        for start in range(0, count, self.batch_size):
            items = [self.held_out[i] for i in range(start, min(start + self.batch_size, count))]
            batch = collate([item for item in items if item.fault is None])
            inputs = {name: _to(value, device) for name, value in batch.items() if name not in ("ids", "faults")}
            with torch.no_grad():
                loss, supervised, _ = supervised_loss(model, inputs)
            total, tokens = total + float(loss), tokens + supervised
        return total / tokens if tokens else None

    def _answer_questions(self, model: nn.Module) -> dict[str, Any]:
        chat = Chat(Engine(model, self.processor, training=True))
        samples: list[dict[str, Any]] = []
        for start in range(0, len(self.questions), self.batch_size):
            samples += self._answer_batch(chat, self.questions[start : start + self.batch_size])
        accuracies = [character_accuracy(sample["answer"], sample["truth"]) for sample in samples]
        count = len(samples)
        return {
            "exact_match": sum(sample["correct"] for sample in samples) / count if count else None,
            "character_accuracy": sum(accuracies) / count if count else None,
            "count": count,
            "samples": samples,
        }

    def _answer_batch(self, chat: Chat, questions: Sequence[ProbeQuestion]) -> list[dict[str, Any]]:
        sampling = Sampling(temperature=0.0, max_new_tokens=self.config.max_new_tokens)
        # Images are prepared as in training, not as in inference: the probe shows what training achieves.
        requests = [
            chat.request(
                self._open(question),
                question.question,
                image_mode=self.processor.image_mode,
                sampling=sampling,
                system=question.system,
            )
            for question in questions
        ]
        answers = [answer.text for answer in chat.answer(requests, batch_size=self.batch_size)]
        return [
            {
                "id": question.id,
                "image": self._thumbnail(question),
                "question": question.question,
                "truth": question.truth,
                "answer": answer,
                "correct": exact_match(answer, question.truth),
            }
            for question, answer in zip(questions, answers, strict=True)
        ]

    def _thumbnail(self, question: ProbeQuestion) -> str:
        """Write a small copy of the image and return its name."""
        # Ids need not be unique; the index among the questions is.
        safe_id = re.sub(r"[^A-Za-z0-9._-]", "_", question.id)[:80]
        name = f"probe/{self.questions.index(question):03d}_{safe_id}.png"
        path = self.directory / name
        if self.writes and not path.exists():
            image = self._open(question)
            image.thumbnail(_THUMBNAIL)
            data = BytesIO()
            image.save(data, "PNG")
            write_bytes(path, data.getvalue())
        return name


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
