"""The package's errors. Each is also a builtin exception and has its own exit status.

A message has the form ``where: what (got X, expected Y). Fix: ...``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

_REASON = 200  # characters of another library's message
_LONGEST_PART = 1000  # characters of each part of a message


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun, for messages: ``1 record``, ``2,000 records``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One problem, its location, and its fix.

    Attributes:
        where: File and record or key, for example ``"records.json:17"`` or ``"stages.0.epochs"``.
        what: The problem, with the actual and the expected value.
        fix: What the user should do, without a full stop.
    """

    where: str
    what: str
    fix: str

    @property
    def mend(self) -> str:
        """Return ``fix`` under its name in version 0.1."""
        warnings.warn("Fault.mend is now Fault.fix", DeprecationWarning, stacklevel=2)
        return self.fix

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. Fix: {self.fix}{'' if self.fix.endswith('?') else '.'}"


DAMAGED = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip
"""What reading a file of JSON raises whose text, structure or values are not those that are expected."""


def describe_reason(error: BaseException) -> str:
    """Return the first line of another library's message, shortened; its kind if it has none.

    ``repr`` of an error may contain the whole file, as that of ``UnicodeDecodeError`` does.
    """
    text = str(error).strip()
    if isinstance(error, KeyError):
        text = f"no {text}"
    line = next(iter(text.splitlines()), "") or type(error).__name__
    return line if len(line) <= _REASON else f"{line[:_REASON]}..."


def _without_middle(text: str) -> str:
    """Return a text without its middle if it is too long to be read: a file may contain a name of any length."""
    if len(text) <= _LONGEST_PART:
        return text
    kept = _LONGEST_PART // 2
    return f"{text[:kept]} ... {text[-kept:]}"


class LlavarError(Exception):
    """Base class of the package's errors.

    Args:
        message: The message for the user.
        faults: The single faults, for an error that reports several.

    Attributes:
        exit_code: Exit status of the command line: 2 for input, 3 for the environment, 4 for an interrupted run that
            can be resumed.
    """

    exit_code: int = 2

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)

    @classmethod
    def at(cls, where: str, what: str, fix: str) -> LlavarError:
        """Return an error with one fault."""
        fault = Fault(*(_without_middle(part) for part in (where, what, fix)))
        return cls(str(fault), (fault,))

    @classmethod
    def listing(cls, where: str, faults: Sequence[Fault]) -> LlavarError:
        """Return an error with several faults of one source, which its message lists line by line."""
        lines = [f"  {fault.where}: {fault.what}; {fault.fix}" for fault in faults]
        return cls("\n".join([f"{where}: {count_of(len(faults), 'problem')}", *lines]), faults)


class ConfigError(LlavarError, ValueError):
    """A recipe or a combination of settings is invalid."""


class DataError(LlavarError, ValueError):
    """Records cannot be used for training."""


class ImageError(LlavarError, OSError):
    """An image is missing, unreadable, too large or outside its folder."""


class WeightsError(LlavarError, ValueError):
    """Weights do not fit the model: a tensor is missing, unexpected, of the wrong shape or not finite."""


class MissingDependencyError(LlavarError, ImportError):
    """A required package is not installed or does not work on this machine."""

    exit_code = 3


class EnvironmentFaultError(LlavarError, RuntimeError):
    """The machine prevents the work: its disk, a device, permissions or another run."""

    exit_code = 3


class InterruptedRunError(LlavarError, RuntimeError):
    """A run was interrupted and saved; the same command resumes it."""

    exit_code = 4
