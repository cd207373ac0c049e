"""What the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["ok", "note", "fault"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: Of the thing.
        state: ``"fault"`` where something that is needed does not work; ``"note"`` where something could be better.
        what: What was found.
        mend: What the reader should do; empty where nothing is to be done.
    """

    name: str
    state: State
    what: str
    mend: str = ""


def fine(name: str, what: str) -> Finding:
    """Nothing to be done."""
    return Finding(name, "ok", what)


def note(name: str, what: str, mend: str) -> Finding:
    """Works, but could be better."""
    return Finding(name, "note", what, mend)


def fault(name: str, what: str, mend: str) -> Finding:
    """Does not work."""
    return Finding(name, "fault", what, mend)
