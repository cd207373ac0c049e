"""Looks at held-out records while training: their loss, and a few images read aloud."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llavar_peft.constants import IMAGE_PLACEHOLDER, PROBE_FILE
from llavar_peft.data.record_store import parse_record
from llavar_peft.data.text_metrics import character_accuracy, exact_match
from llavar_peft.data.training_dataset import Collator, TrainingDataset
from llavar_peft.errors import ImageError
from llavar_peft.models.generate import answer_images
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.schema import ProbeConfig
from llavar_peft.training.run_files import append_line
from llavar_peft.training.supervised_loss import supervised_loss

_THUMBNAIL = (480, 480)


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """One held-out image with its first question and answer."""

    id: str
    path: str
    question: str
    truth: str


class Probe:
    """The look itself. Every rank takes it (a sharded model needs all of them); rank 0 writes.

    Args:
        config: How often, how many.
        held_out: Records that are not trained on.
        processor: The model's.
        directory: The stage's folder: ``probe.jsonl`` and ``probe/`` go there.
        batch_size: Records per forward pass.
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
        self.questions = self._choose()

    def look(self, model: nn.Module, *, step: int, when: Literal["start", "step", "end"]) -> dict[str, Any]:
        """Take one look and writes a line.

        Args:
            model: The model, wrapped as it may be; it is back in its mode afterwards.
            step: Optimizer steps done.
            when: Which look this is.

        Returns:
            The line.
        """
        training = model.training
        model.eval()
        try:
            line: dict[str, Any] = {"step": step, "when": when, "held_out_loss": self._loss(model), **self._read(model)}
        finally:
            model.train(training)
        if self.writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            append_line(self.directory / PROBE_FILE, line)
        return line

    def _choose(self) -> list[ProbeQuestion]:
        """The first held-out records with one image that can be opened, and a question and an answer."""
        chosen: list[ProbeQuestion] = []
        for index in self.held_out.indices.tolist():
            if len(chosen) == self.config.images:
                break
            conversation = parse_record(self.held_out.records[index], f"record {index}")
            if len(conversation.images) != 1 or len(conversation.turns) < 2:
                continue
            try:
                self.held_out.roots.open(conversation.images[0])
            except ImageError:
                continue
            question = conversation.turns[0].text.replace(IMAGE_PLACEHOLDER, "").strip()
            truth = conversation.turns[1].text.strip()
            chosen.append(ProbeQuestion(conversation.id, conversation.images[0], question, truth))
        return chosen

    def _loss(self, model: nn.Module) -> float | None:
        """Mean cross entropy per supervised token."""
        collate = Collator(self.processor.tokenizer.pad_token_id)
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

    def _read(self, model: nn.Module) -> dict[str, Any]:
        samples: list[dict[str, Any]] = []
        for start in range(0, len(self.questions), self.batch_size):
            asked = self.questions[start : start + self.batch_size]
            samples += self._answered(model, asked)
        truths = [question.truth for question in self.questions]
        count = len(samples)
        return {
            "exact_match": sum(sample["correct"] for sample in samples) / count if count else None,
            "character_accuracy": sum(
                character_accuracy(sample["answer"], truth) for sample, truth in zip(samples, truths, strict=True)
            )
            / count
            if count
            else None,
            "count": count,
            "samples": samples,
        }

    def _answered(self, model: nn.Module, asked: Sequence[ProbeQuestion]) -> list[dict[str, Any]]:
        # In the way of training, not of inference: the probe shows what training does.
        answers = answer_images(
            model,
            self.processor,
            [question.question for question in asked],
            [self.held_out.roots.open(question.path) for question in asked],
            max_new_tokens=self.config.max_new_tokens,
            image_mode=self.processor.image_mode,
        )
        return [
            {
                "id": question.id,
                "image": self._thumbnail(question),
                "question": question.question,
                "truth": question.truth,
                "answer": answer,
                "correct": exact_match(answer, question.truth),
            }
            for question, answer in zip(asked, answers, strict=True)
        ]

    def _thumbnail(self, question: ProbeQuestion) -> str:
        # Ids need not be unique; an image's place among the questions is.
        name = (
            f"probe/{self.questions.index(question):03d}_" + re.sub(r"[^A-Za-z0-9._-]", "_", question.id)[:80] + ".png"
        )
        path = self.directory / name
        if self.writes and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            image = self.held_out.roots.open(question.path)
            image.thumbnail(_THUMBNAIL)
            image.save(path)
        return name


def _to(value: Any, device: torch.device) -> Any:
    return [item.to(device) for item in value] if isinstance(value, list) else value.to(device)
