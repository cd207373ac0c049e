"""Run commands in forked processes that a fault of the machine hits: a full disk, a signal, missing permissions."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from llavar_peft.cli import main
from tests.commands import PRELOADED

_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root may write to read-only folders
_CAPABILITY_VERSION = 0x20080522

Fault = Callable[[], None]
"""Called in the process before its command."""


def no_fault() -> None:
    """Do nothing."""


def limit_files(size: int) -> None:
    """Let every write beyond a size fail, in Python, torch and safetensors alike, as on a full disk.

    The kernel refuses it (``RLIMIT_FSIZE``), for every user and without a mount; Python ignores the signal. Compiled
    modules are not written, because Python would leave a truncated one that every later process fails to read.
    """
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def obey_permissions() -> None:
    """Take root's privilege to ignore permissions, so that a read-only folder is one for every user."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
        sets = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(header, sets) == 0
        for index in range(2):
            sets[index] &= ~_OVERRIDES
        assert libc.capset(header, sets) == 0


def use_temporary(folder: str, fault: Fault) -> None:
    """Let temporary files be in a folder, where a fault hits them."""
    tempfile.tempdir = folder
    fault()


def send_at(number: int, name: str, events: Sequence[int]) -> None:
    """Send this process a signal at the n-th operations on an output, whose path in the folder begins with a name."""

    def count(seen: int) -> None:
        if seen in events:
            os.kill(os.getpid(), number)

    _watch(name, count)


def count_events(name: str, found: str) -> None:
    """Write the number of such operations to a file."""
    handle = os.open(found, os.O_WRONLY | os.O_CREAT)
    _watch(name, lambda seen: os.pwrite(handle, str(seen).encode(), 0))


def _watch(name: str, call: Callable[[int], object]) -> None:
    seen, process, folder = 0, os.getpid(), f"{os.getcwd()}/"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in _FILE_EVENTS or os.getpid() != process:
            return
        if str(arguments[0]).removeprefix(folder).startswith((name, f".{name}")):
            seen += 1
            call(seen)

    sys.addaudithook(hook)


@dataclass(frozen=True)
class Ended:
    """The status of a process, negative for a signal, and all its output."""

    status: int | None
    output: str


class Running:
    """A process that runs a command in a folder.

    Its output goes through a pipe, because a file would be subject to the limits too.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, fault: Fault = no_fault) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._output = b""
        self._pipe, theirs = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=_run, args=(list(arguments), str(folder), fault, theirs))
        self.process.start()
        theirs.close()

    def read_until(self, text: str) -> str:
        """Return the output so far as soon as a text is in it, or at the end."""
        while text.encode() not in self._output and (piece := os.read(self._pipe.fileno(), 1 << 16)):
            self._output += piece
        return self._output.decode(errors="replace")

    def wait(self) -> Ended:
        """Wait for the end."""
        while piece := os.read(self._pipe.fileno(), 1 << 16):
            self._output += piece
        self.process.join()
        return Ended(self.process.exitcode, self._output.decode(errors="replace"))


def run(arguments: Sequence[str], folder: Path, fault: Fault = no_fault) -> Ended:
    """Run ``llavar-peft`` in a folder."""
    return Running(arguments, folder, fault).wait()


def full_disk(size: int) -> Fault:
    """Return ``limit_files`` for a size."""
    return partial(limit_files, size)


def signal_at(number: int, name: str, *events: int) -> Fault:
    """Return ``send_at`` for a signal."""
    return partial(send_at, number, name, events)


def _run(arguments: list[str], folder: str, fault: Fault, pipe: Any) -> None:
    import torch

    for number in (1, 2):
        os.dup2(pipe.fileno(), number)
    pipe.close()
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    os.environ.update({"OPENAI_API_KEY": "local", "HF_HUB_OFFLINE": "1"})
    os.chdir(folder)
    fault()
    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
