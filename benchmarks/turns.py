"""Trainings in processes of their own that take turns, step by step.

All are forked from one process that has imported everything and run nothing, so that they start alike and none pays for
imports. While one makes its step the others wait. Linux only.
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
    """What a contender did.

    Attributes:
        cpu: Seconds of CPU time of each step, the batch's making included.
        wall: Seconds by the clock.
        losses: Of each step.
        imports: Bytes resident before its model was made.
        model: Bytes resident once it was ready to train.
        peak: Most bytes resident while it trained.
        absent: Why it did not run, else None.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    imports: float = 0.0
    model: float = 0.0
    peak: float = 0.0
    absent: str | None = None


class Turn(TrainerCallback):
    """Gives the turn back after each optimizer step, and says what the step took.

    Args:
        line: To the process that hands out the turns.
    """

    def __init__(self, line: Connection) -> None:
        self.line = line
        self.losses: list[float] = []

    def wait(self) -> None:
        """Wait for the turn."""
        self.line.recv()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        self.line.send((time.process_time() - self._cpu, time.perf_counter() - self._wall))
        self.wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A step's loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def take_turns(makers: dict[str, Callable[[Turn], Any]], steps: int, *, lean: bool = False) -> dict[str, Steps]:
    """Train all contenders, a step each in turn; the order is turned round after each step.

    Args:
        makers: Makes each contender's trainer, in its own process.
        steps: Optimizer steps that each one's ``train()`` makes.
        lean: Whether freed memory goes back to the system at once, so that the peak is what is in use. Otherwise it is
            kept, as a GPU's allocator does: fetching it again at each step takes time that depends on the machine.

    Returns:
        What each did.
    """
    found = {name: Steps() for name in makers}
    with _processes(makers, lean) as lines:
        for name, line in lines.items():
            found[name].imports, found[name].model, found[name].absent = _received(name, line)
        running = [name for name in makers if found[name].absent is None]
        for step in range(steps):
            for name in running if step % 2 == 0 else running[::-1]:
                lines[name].send("go")
                cpu, wall = _received(name, lines[name])
                found[name].cpu.append(cpu)
                found[name].wall.append(wall)
        for name in running:
            lines[name].send("go")
            found[name].losses, found[name].peak = _received(name, lines[name])
    return found


@contextmanager
def _processes(makers: dict[str, Callable[[Turn], Any]], lean: bool) -> Iterator[dict[str, Connection]]:
    context = multiprocessing.get_context("fork")
    lines, children = {}, []
    for name, make in makers.items():
        lines[name], theirs = context.Pipe()
        # One after the other: each is ready before the next is made.
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
    warnings.simplefilter("ignore", FutureWarning)  # of names that the library still goes by
    turn = Turn(line)
    imports = resident("VmRSS")
    try:
        trainer = make(turn)
    except ImportError as error:
        line.send((imports, imports, f"{error.name or 'a package'} is not installed"))
        return
    try:
        line.send((imports, resident("VmRSS"), None))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        turn.wait()
        trainer.train()
        line.send((turn.losses, resident("VmHWM")))
    except EOFError:
        os._exit(1)  # whoever handed out the turns is gone
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise


def _allocate(lean: bool) -> None:
    """Set glibc's allocator, for this process; another one stays as it is."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    if lean:
        set_option(_MMAP_THRESHOLD, 2**20)
    else:
        set_option(_MMAP_MAX, 0)
        set_option(_TRIM_THRESHOLD, 2**31 - 1)


def _received(name: str, line: Connection) -> Any:
    try:
        return line.recv()
    except EOFError:
        raise SystemExit(f"{name}: ended by an error, see above") from None


def resident(what: str) -> float:
    """Memory of this process, in bytes: ``VmRSS`` now, ``VmHWM`` at most.

    Args:
        what: The kernel's name.

    Returns:
        The bytes.
    """
    text = Path("/proc/self/status").read_text()
    return float(text.split(f"{what}:")[1].split()[0]) * 1024


def useful_tokens(records: Sequence[Any], batch: int, steps: int) -> list[int]:
    """Tokens of each step, without padding."""
    lengths = [len(item.example.input_ids) for item in records]
    return [sum(lengths[step * batch : (step + 1) * batch]) for step in range(steps)]
