"""Read PDF files in a process of their own, which is started at the first file and runs ``pdf_worker``.

A file that crashes the reader, or takes it too long, becomes an error here instead of the end of this process.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, Final

from llavar_peft.errors import EnvironmentFaultError, MissingDependencyError

SECONDS: Final = 30.0
"""Time of computing for one page; a page takes about a tenth of a second."""
_WORKER: Final = Path(__file__).with_name("pdf_worker.py")


class PdfCrashError(Exception):
    """The process ended while it read a file."""


class _PdfProcess:
    """A process that reads PDF files, one request at a time; after a crash, the next request starts another."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], data: bytes | memoryview) -> tuple[dict[str, Any], bytes]:
        line = json.dumps({**request, "size": len(data)}).encode() + b"\n"
        with self._lock:
            if self._process is None:
                self._process = self._start()
            done = False
            try:
                answer = self._exchange(self._process, line, data)
                done = True
                return answer
            except (OSError, ValueError) as error:  # its end of a pipe is closed
                raise PdfCrashError from error
            finally:
                if not done:  # also after Ctrl-C: the rest of an answer would be taken for the next one
                    self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        # Isolated: otherwise Python would look for modules in the current folder, where a data set may lie.
        command = [sys.executable, "-I", str(_WORKER), json.dumps(sys.path)]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            what = f"the process that reads PDF files cannot be started ({error})"
            raise EnvironmentFaultError.at(sys.executable, what, "free memory, or end other processes") from error
        atexit.unregister(self._stop)
        atexit.register(self._stop)
        return process

    @staticmethod
    def _exchange(
        process: subprocess.Popen[bytes], line: bytes, data: bytes | memoryview
    ) -> tuple[dict[str, Any], bytes]:
        requests, answers = process.stdin, process.stdout
        if requests is None or answers is None:
            raise ValueError("the process has no pipes")
        requests.write(line)
        requests.write(data)
        requests.flush()
        answer: dict[str, Any] = json.loads(answers.readline())
        return answer, _read(answers, answer["size"])

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None or os.getpid() != self._owner:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was not sent cannot be sent any more
                    continue


def _read(answers: IO[bytes], size: int) -> bytes:
    data = answers.read(size)
    if len(data) < size:
        raise ValueError("the answer is incomplete")
    return data


_processes: dict[int, _PdfProcess] = {}


def ask_pdf_process(
    path: str | None, data: bytes | memoryview, page: int | None, *, text: bool = False, seconds: float = SECONDS
) -> tuple[dict[str, Any], bytes]:
    """Return what ``pdf_worker`` answers about a document, and the pixels of a page.

    Args:
        path: The file; None reads ``data``.
        data: The bytes of the file, without a path.
        page: Number of the page, from 1; None counts the pages.
        text: Whether the text of the page is read too.
        seconds: Time of computing after which the process ends.

    Raises:
        PdfCrashError: The process ended, because of the time, of memory, or of a fault in PDFium.
        MissingDependencyError: pypdfium2 is not installed.
        EnvironmentFaultError: The process cannot be started.
    """
    require_pdf()
    # A process that was forked must not share the pipes, or the lock, of the one that it comes from.
    process = _processes.setdefault(os.getpid(), _PdfProcess())
    return process.ask({"path": path, "page": page, "text": text, "seconds": seconds}, data)


def require_pdf(where: str = "pypdfium2") -> None:
    """Check that PDF files can be read.

    Args:
        where: What needs it, for the message.

    Raises:
        MissingDependencyError: pypdfium2 is not installed.
    """
    if importlib.util.find_spec("pypdfium2") is None:
        what = "PDF documents need the package pypdfium2, which is not installed"
        raise MissingDependencyError.at(where, what, "pip install 'llavar-peft[pdf]'")
