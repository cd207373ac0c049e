"""The parts of ``transformers.Trainer`` that have no public counterpart.

They have a file of their own because importing ``Trainer`` takes seconds, which inference must not pay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import nn


class TrainerInternals(transformers.Trainer, ABC):
    """Map the private methods of ``transformers.Trainer`` that are still needed onto public hooks.

    Replaces three private methods, which have had these names and arguments since transformers 5.0:

    * ``_prepare_for_training`` is the only place between the whole model and its shards, and it asks DeepSpeed for
      DeepSpeed's own checkpoint format. The hooks ``load_weights``, ``shard_pending``, ``check_prepared`` and
      ``load_training_state`` are called there instead.
    * ``_load_from_checkpoint`` would load the weights a second time, by names that adapters and trained rows lack.
    * ``_get_grad_norm`` is the only access to the norm before the optimizer step; ``on_pre_optimizer_step`` is not
      given it, and after clipping an infinite norm can no longer be computed again. The hook ``fetch_norm`` turns it
      into a number.

    Attributes:
        grad_norm: Norm of the gradient of the current optimizer step, before clipping.
    """

    control: transformers.TrainerControl
    grad_norm: float = 0.0

    @abstractmethod
    def load_weights(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint while every rank still has the whole model."""

    def shard_pending(self) -> None:
        """Shard a model that has no values yet, after the weights of a checkpoint were set."""

    def check_prepared(self, model: nn.Module) -> None:
        """Check the model after it was wrapped or sharded."""

    @abstractmethod
    def load_training_state(self, checkpoint: Path) -> None:
        """Load optimizer, schedule and scaler, all of which exist by now."""

    def fetch_norm(self, norm: Any) -> float:
        """Return the gradient's norm, a tensor or a number, as a number. Called once in each optimizer step."""
        return float(norm)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        if resume_from_checkpoint:
            self.load_weights(Path(resume_from_checkpoint))
        self.shard_pending()
        prepared: tuple[nn.Module, Any] = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.check_prepared(prepared[0])
        if resume_from_checkpoint:
            self.load_training_state(Path(resume_from_checkpoint))
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load nothing: ``load_weights`` does it."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self.grad_norm = self.fetch_norm(super()._get_grad_norm(model, grad_norm=grad_norm))
        return self.grad_norm


@contextmanager
def allow_quantized_base(model: Any) -> Iterator[None]:
    """Let ``transformers.Trainer`` accept a quantized model without adapters while it is constructed.

    Replaces its check that a quantized model has adapters. The check cannot be disabled, although training the parts
    that are not quantized is sound. It reads ``is_quantized`` since transformers 4.31.
    """
    quantized = model.is_quantized
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = quantized
