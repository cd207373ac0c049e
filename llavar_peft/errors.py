"""The one family of errors. Each is also a builtin exception, and each knows its exit status.

A message reads ``<file>:<record or key>: what (got, wanted). Fix: ...``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, where it is, and how to fix it.

    Attributes:
        where: File and record or key, e.g. ``"records.json:17"`` or ``"stages.0.epochs"``.
        what: What is wrong, with the value got and the value wanted.
        fix: What the reader should do, one sentence without a final stop.
    """

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. Fix: {self.fix}{'' if self.fix.endswith('?') else '.'}"


class LlavarError(Exception):
    """Base of the family.

    Args:
        message: What the reader sees.
        faults: The single faults, where the error reports several at once.

    Attributes:
        exit_code: What the command line exits with: 2 input, 3 environment, 4 interrupted but resumable.
    """

    exit_code: int = 2

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)

    @classmethod
    def at(cls, where: str, what: str, fix: str) -> LlavarError:
        """Make an error of this class from one fault."""
        fault = Fault(where, what, fix)
        return cls(str(fault), (fault,))

    @classmethod
    def listing(cls, where: str, faults: Sequence[Fault]) -> LlavarError:
        """Make an error of this class from several faults of one source, one per line."""
        lines = [f"  {fault.where}: {fault.what}; {fault.fix}" for fault in faults]
        return cls("\n".join([f"{where}: {len(faults)} problem{'' if len(faults) == 1 else 's'}", *lines]), faults)


class ConfigError(LlavarError, ValueError):
    """A recipe, or a combination of settings, that cannot be run."""


class DataError(LlavarError, ValueError):
    """Records that cannot be trained on."""


class ImageError(LlavarError, OSError):
    """An image that is missing, broken, too large or outside its root."""


class WeightsError(LlavarError, ValueError):
    """Weights that do not fit the model: a tensor missing, extra, misshapen or not finite."""


class MissingDependencyError(LlavarError, ImportError):
    """A package that this job needs is not installed or cannot work here."""

    exit_code = 3


class EnvironmentFaultError(LlavarError, RuntimeError):
    """The machine, not the input, stands in the way (disk, device, permissions, another run)."""

    exit_code = 3


class InterruptedRunError(LlavarError, RuntimeError):
    """A run stopped on request after saving; running the same command again continues it."""

    exit_code = 4
