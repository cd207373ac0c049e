"""The command ``llavar-peft``: the only place that configures logging, prints and exits."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from llavar_peft.cli.app import Session, build_app
from llavar_peft.cli.output import complain
from llavar_peft.errors import LlavarError

_UNEXPECTED = 1
_INTERRUPTED = 130  # as shells report a command that Ctrl-C ended: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name; None takes those of the process.

    Returns:
        The exit status: 0 success, 1 unexpected error, 2 invalid input, 3 environment, 4 interrupted after saving,
        130 interrupted.
    """
    session = Session()
    try:
        build_app()(args=arguments, obj=session, prog_name="llavar-peft")
    except SystemExit as stop:  # how click ends every command
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except LlavarError as error:
        _print_traceback(session)
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        complain("interrupted")
        return _INTERRUPTED
    except Exception as error:  # noqa: BLE001 - no traceback by default
        _print_traceback(session)
        hint = "" if session.debug else " (run again with llavar-peft --debug ... for the traceback)"
        complain(f"unexpected {type(error).__name__}: {error}{hint}")
        return _UNEXPECTED
    return 0


def _print_traceback(session: Session) -> None:
    if session.debug:
        traceback.print_exc(file=sys.stderr)
