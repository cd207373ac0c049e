"""Callbacks of a stage: a progress bar, a clean stop on a signal, the evaluation of held-out records."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from llavar_peft.models.rank_agreement import largest_of_ranks, on_any_rank
from llavar_peft.training.holdout_probe import Probe

logger = logging.getLogger(__name__)

SAVE_SECONDS = 1800.0
"""Time between two checkpoints, if a stage does not set ``save_every_steps``."""
_MEASURED_STEPS = 4
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


class SaveByTime(TrainerCallback):
    """Requests a checkpoint about every 30 minutes.

    From the measured duration of the steps, it plans after how many steps to look at the clock again. The ranks agree
    on that number, so that they save at the same step, and exchange nothing at other steps.

    Args:
        seconds: Time between two checkpoints.
        clock: Returns the time in seconds.
    """

    def __init__(self, seconds: float = SAVE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._saved_at: float | None = None
        self._measured_from = (0, 0.0)  # step and time
        self._plans = 0
        self._next = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock at the first step, after the evaluation before it."""
        if self._saved_at is None:
            self._saved_at = self._clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a checkpoint if its time has come, except at the last step, whose result is saved anyway."""
        step, now = state.global_step, self._clock()
        if self._saved_at is None or step >= state.max_steps:
            return
        if self._plans == 0:  # the first step may compile; the others are measured without it
            self._measured_from, self._next, self._plans = (step, now), step + 1, 1
            return
        done = step - self._measured_from[0]
        if step < self._next and not (self._plans == 2 and done == _MEASURED_STEPS):
            return
        duration = max((now - self._measured_from[1]) / done, 1e-6)
        steps = largest_of_ranks(max(0, round((self._saved_at + self._seconds - now) / duration)))
        if steps == 0:
            control.should_save = True
            self._saved_at = now
        self._measured_from, self._next, self._plans = (step, now), step + max(1, steps), self._plans + 1
        if self._plans == 3:
            every = max(1, round(self._seconds / duration))
            logger.info("a checkpoint is saved about every %d minutes, or %d steps", self._seconds / 60, every)


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
