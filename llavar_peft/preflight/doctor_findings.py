"""The findings of ``llavar-peft doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["ok", "note", "fault"]


@dataclass(frozen=True, slots=True)
class DoctorFinding:
    """The result of one check.

    Attributes:
        name: What was checked.
        state: ``"fault"`` if something required does not work, ``"note"`` if something could be improved.
        what: What was found.
        fix: What the user should do; empty if nothing.
    """

    name: str
    state: State
    what: str
    fix: str = ""


def ok_finding(name: str, what: str) -> DoctorFinding:
    """Return the finding that something works."""
    return DoctorFinding(name, "ok", what)


def note_finding(name: str, what: str, fix: str) -> DoctorFinding:
    """Return the finding that something works but could be improved."""
    return DoctorFinding(name, "note", what, fix)


def fault_finding(name: str, what: str, fix: str) -> DoctorFinding:
    """Return the finding that something required does not work."""
    return DoctorFinding(name, "fault", what, fix)
