"""The command ``llavar-peft``: the only place that configures logging, prints and exits.

Nothing is imported here that takes time, so that Ctrl-C is handled from the beginning.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from llavar_peft.compat.deferred_compilation import defer_compilation
from llavar_peft.compat.usable_cores import spin_briefly

_UNEXPECTED = 1
_INTERRUPTED = 130  # as shells report a command that Ctrl-C ended: 128 + SIGINT
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run() -> NoReturn:
    """Run the command line as a process of its own, and exit with its status."""
    # The imports make a million objects and no garbage, and looking for garbage takes a sixth of their time.
    gc.set_threshold(10_000)
    defer_compilation()
    spin_briefly(os.environ)
    status = main()
    # While Python shuts down, a second Ctrl-C would print a traceback.
    for number in _SIGNALS:
        signal.signal(number, lambda *_: os._exit(status))
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: 0 success, 1 unexpected error, 2 invalid input, 3 environment, 4 interrupted after saving,
        130 interrupted.
    """
    try:
        with _sigterm_as_ctrl_c():
            return _run_command(arguments)
    except KeyboardInterrupt:  # before or after the command
        return _report_interruption()


def _run_command(arguments: Sequence[str] | None) -> int:
    debug = False
    try:
        from llavar_peft.cli.app import Session, build_app
        from llavar_peft.cli.lazy_commands import lazy_program
        from llavar_peft.cli.output import prepare_streams

        session = Session()
        prepare_streams()
        try:
            lazy_program(build_app())(args=arguments, obj=session, prog_name="llavar-peft")
        finally:
            debug = session.debug
        sys.stdout.flush()
    except SystemExit as stop:  # how click ends every command
        if _was_interrupted(stop):
            return _report_interruption()
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except Exception as error:  # noqa: BLE001 - no traceback by default
        return _report_error(error, debug=debug)
    return 0


def _report_error(error: Exception, *, debug: bool) -> int:
    """Print an error and return the exit status."""
    from llavar_peft.atomic_files import is_disk_full
    from llavar_peft.cli.output import complain, make_safe
    from llavar_peft.errors import EnvironmentFaultError, LlavarError

    if debug:
        print(make_safe(traceback.format_exc()), file=sys.stderr)  # noqa: T201
    if isinstance(error, LlavarError):
        complain(str(error))
        return error.exit_code
    if _was_interrupted(error):
        return _report_interruption()
    if isinstance(error, OSError) and is_disk_full(error):
        where = error.filename or "the output"
        complain(
            f"{where}: cannot be written ({error.strerror}). Fix: free some space, and run the same command again."
        )
        return EnvironmentFaultError.exit_code
    end = error.__cause__ if isinstance(error.__cause__, EOFError) else error
    if isinstance(end, EOFError) and ("marshal" in str(end) or "pyc" in str(end)):
        libraries = sysconfig.get_path("purelib")
        complain(
            f"{libraries}: a compiled module (.pyc) is damaged, as a full disk leaves it. "
            f"Fix: free some space if needed, and run 'python -m compileall -qf {libraries}'."
        )
        return EnvironmentFaultError.exit_code
    hint = "" if debug else " (run again with llavar-peft --debug ... for the traceback)"
    complain(f"unexpected {type(error).__name__}: {error}{hint}")
    return _UNEXPECTED


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is the cause of an error: click exits on it, and some libraries raise ImportError from it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _report_interruption() -> int:
    print("error: interrupted", file=sys.stderr, flush=True)  # noqa: T201 - typer may not be imported yet
    return _INTERRUPTED


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does.

    Not under a launcher of several processes: one that waits for the others could not handle the signal.
    """
    process = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as signal calls it
        if os.getpid() == process:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a forked worker, which its parent ends
        os.kill(os.getpid(), number)

    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    if not (alone and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL):
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
