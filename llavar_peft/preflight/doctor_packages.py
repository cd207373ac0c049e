"""Python and the packages, against this package's own metadata."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llavar_peft.preflight.doctor_findings import DoctorFinding, fault_finding, note_finding, ok_finding

_DISTRIBUTION = "llavar-peft"


def check_packages() -> Iterator[DoctorFinding]:
    """Look at Python, at every package that is needed, and at what the extras would add.

    Yields:
        A finding for Python, one for each needed package, and one for each extra.
    """
    try:
        about = metadata.metadata(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield fault_finding(_DISTRIBUTION, "is not installed", "pip install -e . in its folder")
        return
    expected, running = about["Requires-Python"], platform.python_version()
    if running in SpecifierSet(expected):
        yield ok_finding("Python", f"{running} ({sys.executable})")
    else:
        yield fault_finding("Python", f"{running}, expected {expected}", f"install Python {expected}")
    requirements = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or ()]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_requirement(requirement)
    for extra in about.get_all("Provides-Extra") or ():
        if extra != "dev":
            yield _extra(extra, [one for one in requirements if one.marker and one.marker.evaluate({"extra": extra})])


def check_requirement(requirement: Requirement) -> DoctorFinding:
    """Whether a package is installed in a version that will do.

    Args:
        requirement: As in the package's metadata.

    Returns:
        The finding.
    """
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return fault_finding(requirement.name, f"is missing (wanted {requirement.specifier})", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return fault_finding(requirement.name, f"is {version} (wanted {requirement.specifier})", fix)
    return ok_finding(requirement.name, version)


def _extra(name: str, requirements: Sequence[Requirement]) -> DoctorFinding:
    needed = {
        "ocr": "ocr build",
        "eval": "eval judge",
        "serve": "serve",
        "lmms-eval": "lmms-eval",
        "cuda": "speed on GPUs",
        "deepspeed": "ZeRO",
    }
    lacking = [one.name for one in requirements if check_requirement(one).state == "fault"]
    label = f"[{name}]"
    if not lacking:
        return ok_finding(label, "is there")
    why = f", for {needed[name]}" if name in needed else ""
    return note_finding(
        label, f"lacks {', '.join(lacking)}{why}", f"pip install '{_DISTRIBUTION}[{name}]' if you want it"
    )
