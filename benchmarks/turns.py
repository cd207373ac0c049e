"""Run several trainings in separate processes that take turns, step by step.

All processes are forked from one that has imported everything and computed nothing, so that they start in the same
state and none spends time on imports. While one makes a step, the others wait. Linux only.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Options of glibc's ``mallopt`` (malloc.h)."""


@dataclass
class Steps:
    """Measurements of one contender.

    Attributes:
        cpu: CPU seconds of each step, including the time to make the batch.
        wall: Wall-clock seconds of each step.
        losses: Loss of each step.
        imports: Resident bytes before the model was built.
        model: Resident bytes when the contender was ready to train.
        peak: Largest number of resident bytes during the training.
        absent: The reason why the contender did not run, or None.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    imports: float = 0.0
    model: float = 0.0
    peak: float = 0.0
    absent: str | None = None


class Turn(TrainerCallback):
    """Reports the time of each optimizer step, and waits for the next turn.

    Args:
        line: The connection to the process that assigns the turns.
    """

    def __init__(self, line: Connection) -> None:
        self.line = line
        self.losses: list[float] = []

    def wait(self) -> None:
        """Wait for the turn."""
        self.line.recv()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a step and wait for the next turn."""
        self.line.send((time.process_time() - self._cpu, time.perf_counter() - self._wall))
        self.wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record the loss of a step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def take_turns(makers: dict[str, Callable[[Turn], Any]], steps: int, *, lean: bool = False) -> dict[str, Steps]:
    """Train all contenders, one step each in turn, and reverse the order after each step.

    Args:
        makers: Functions that build each contender's trainer, called in its own process.
        steps: Number of optimizer steps of each contender's ``train()``.
        lean: Whether freed memory is returned to the system at once, so that the peak is the memory in use. Otherwise
            it is kept, as a GPU's allocator does: allocating it again in each step takes time that depends on the
            machine.

    Returns:
        The measurements by contender.
    """
    found = {name: Steps() for name in makers}
    with _processes(makers, lean) as lines:
        for name, line in lines.items():
            found[name].imports, found[name].model, found[name].absent = _receive(name, line)
        running = [name for name in makers if found[name].absent is None]
        for step in range(steps):
            for name in running if step % 2 == 0 else running[::-1]:
                lines[name].send("go")
                cpu, wall = _receive(name, lines[name])
                found[name].cpu.append(cpu)
                found[name].wall.append(wall)
        for name in running:
            lines[name].send("go")
            found[name].losses, found[name].peak = _receive(name, lines[name])
    return found


@contextmanager
def _processes(makers: dict[str, Callable[[Turn], Any]], lean: bool) -> Iterator[dict[str, Connection]]:
    context = multiprocessing.get_context("fork")
    lines, children = {}, []
    for name, make in makers.items():
        lines[name], theirs = context.Pipe()
        # Wait until each is ready before the next one starts.
        children.append(context.Process(target=_train, args=(make, theirs, lean)))
        children[-1].start()
        theirs.close()
        lines[name].poll(None)
    try:
        yield lines
    finally:
        for line in lines.values():
            line.close()
        for child in children:
            child.terminate()
            child.join()


def _train(make: Callable[[Turn], Any], line: Connection, lean: bool) -> None:
    _allocate(lean)
    warnings.simplefilter("ignore", FutureWarning)  # about names that changed in newer versions
    turn = Turn(line)
    imports = resident("VmRSS")
    try:
        trainer = make(turn)
    except ImportError as error:
        line.send((imports, imports, f"{error.name or 'a package'} is not installed"))
        return
    try:
        line.send((imports, resident("VmRSS"), None))
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        turn.wait()
        trainer.train()
        line.send((turn.losses, resident("VmHWM")))
    except EOFError:
        os._exit(1)  # the process that assigns the turns has exited
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise


def _allocate(lean: bool) -> None:
    """Configure the allocator of this process, if it is glibc's."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    if lean:
        set_option(_MMAP_THRESHOLD, 2**20)
    else:
        set_option(_MMAP_MAX, 0)
        set_option(_TRIM_THRESHOLD, 2**31 - 1)


def _receive(name: str, line: Connection) -> Any:
    try:
        return line.recv()
    except EOFError:
        raise SystemExit(f"{name}: failed, see the error above") from None


def resident(what: str) -> float:
    """Return the resident memory of this process, in bytes.

    Args:
        what: ``VmRSS`` for the current value, ``VmHWM`` for the peak.
    """
    text = Path("/proc/self/status").read_text()
    return float(text.split(f"{what}:")[1].split()[0]) * 1024


def useful_tokens(records: Sequence[Any], batch: int, steps: int) -> list[int]:
    """Return the number of tokens of each step, without padding."""
    lengths = [len(item.example.input_ids) for item in records]
    return [sum(lengths[step * batch : (step + 1) * batch]) for step in range(steps)]
