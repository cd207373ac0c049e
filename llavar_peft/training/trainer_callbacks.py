"""Callbacks of a stage: a progress bar, a clean stop on a signal, the evaluation of held-out records."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from llavar_peft.models.rank_agreement import on_any_rank
from llavar_peft.training.holdout_probe import Probe

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ProgressBar(TrainerCallback):
    """Shows steps, loss, tokens per second and remaining time on one line, labelled with the stage's name."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None

    def show(self, figures: dict[str, Any]) -> None:
        """Show the figures of a step."""
        if self.bar is not None:
            rate = figures.get("tokens_per_second")
            self.bar.set_postfix_str(
                f"loss {figures['loss']:.3f}" + (f", {rate:,.0f} tokens/s" if rate else ""), refresh=False
            )

    def close(self) -> None:
        """Close the bar, if it is open."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar at the current step."""
        if state.is_world_process_zero:
            interval = 0.2 if sys.stderr.isatty() else 10.0
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.label, unit="step", mininterval=interval
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops after the current step on Ctrl-C or SIGTERM; a second signal stops at once.

    The handlers are installed during training only, and only in the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after this step if any rank received a signal."""
        if on_any_rank(self.requested):
            self.requested = True
            # A run at its last step is finished, not interrupted.
            if state.global_step < state.max_steps:
                control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.restore()
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("%s: saving after this step; send it again to stop at once", signal.Signals(number).name)


class EvalCallback(TrainerCallback):
    """Runs the probe at the start of a stage, at regular intervals, and at its end."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the probe before the first step; a resumed run has done so already."""
        if state.global_step == 0:
            self.probe.run(kwargs["model"], step=0, when="start")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Run the probe at its interval, after the figures of the step were written without the probe's time."""
        every = self.probe.config.every_steps
        if every and "loss" in (logs or {}) and state.global_step % every == 0 and state.global_step < state.max_steps:
            self.probe.run(kwargs["model"], step=state.global_step, when="step")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the probe on the result, unless the run was interrupted."""
        if state.global_step >= state.max_steps:
            self.probe.run(kwargs["model"], step=state.global_step, when="end")
