"""What the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["ok", "note", "fault"]


@dataclass(frozen=True, slots=True)
class DoctorFinding:
    """One thing that was looked at.

    Attributes:
        name: Of the thing.
        state: ``"fault"`` where something that is needed does not work; ``"note"`` where something could be better.
        what: What was found.
        fix: What the reader should do; empty where nothing is to be done.
    """

    name: str
    state: State
    what: str
    fix: str = ""


def ok_finding(name: str, what: str) -> DoctorFinding:
    """Nothing to be done."""
    return DoctorFinding(name, "ok", what)


def note_finding(name: str, what: str, fix: str) -> DoctorFinding:
    """Works, but could be better."""
    return DoctorFinding(name, "note", what, fix)


def fault_finding(name: str, what: str, fix: str) -> DoctorFinding:
    """Do not work."""
    return DoctorFinding(name, "fault", what, fix)
