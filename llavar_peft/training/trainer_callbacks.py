"""What happens beside the steps: progress on the terminal, an orderly stop on a signal, looks at held-out images."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llavar_peft.training.holdout_probe import Probe
from llavar_peft.training.rank_agreement import on_any_rank

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProgressBar(TrainerCallback):
    """One line: steps done, loss, useful tokens per second, time left.

    Args:
        label: The stage's name, with its number.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None
        self.figures: dict[str, Any] = {}

    def show(self, figures: dict[str, Any]) -> None:
        """Take a step's figures."""
        self.figures = figures
        if self.bar is not None:
            rate = figures.get("tokens_per_second")
            self.bar.set_postfix_str(
                f"loss {figures['loss']:.3f}" + (f", {rate:,.0f} tokens/s" if rate else ""), refresh=False
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where the run stands."""
        if state.is_world_process_zero:
            interval = 0.2 if sys.stderr.isatty() else 10.0
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.label, unit="step", mininterval=interval
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint; a second one ends it at once.

    Handlers are installed only while training, and only in the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in _SIGNALS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this step if a signal came to any rank."""
        if on_any_rank(self.requested, args.device):
            self.requested = True
            # A run at its last step is finished, not interrupted.
            if state.global_step < state.max_steps:
                control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Return the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.restore()
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("%s: saving after this step; once more to leave at once", signal.Signals(number).name)


class EvalCallback(TrainerCallback):
    """Runs the probe at a stage's start, every so many steps, and at its end.

    Args:
        probe: What is looked at.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look before the first step; a resumed run has done so."""
        if state.global_step == 0:
            self.probe.run(kwargs["model"], step=0, when="start")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Look on the way, after a step's figures are written so that its time is not counted in them."""
        every = self.probe.config.every_steps
        if every and "loss" in (logs or {}) and state.global_step % every == 0 and state.global_step < state.max_steps:
            self.probe.run(kwargs["model"], step=state.global_step, when="step")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the result, unless the run was interrupted."""
        if state.global_step >= state.max_steps:
            self.probe.run(kwargs["model"], step=state.global_step, when="end")
