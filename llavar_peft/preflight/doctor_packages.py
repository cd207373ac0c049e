"""Checks of Python and of the installed packages against this package's requirements."""

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
    """Check Python, every required package, and the packages of each extra."""
    try:
        about = metadata.metadata(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield fault_finding(_DISTRIBUTION, "is not installed", "run pip install -e . in its folder")
        return
    expected, running = about["Requires-Python"], platform.python_version()
    if running in SpecifierSet(expected):
        yield ok_finding("Python", f"{running} ({sys.executable})")
    else:
        yield fault_finding("Python", f"got {running}, expected {expected}", f"install Python {expected}")
    requirements = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or ()]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_requirement(requirement)
    for extra in about.get_all("Provides-Extra") or ():
        if extra != "dev":
            yield _extra(extra, [one for one in requirements if one.marker and one.marker.evaluate({"extra": extra})])


def check_requirement(requirement: Requirement) -> DoctorFinding:
    """Check that a package is installed in a suitable version."""
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return fault_finding(requirement.name, f"is not installed (expected {requirement.specifier})", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return fault_finding(requirement.name, f"got {version}, expected {requirement.specifier}", fix)
    return ok_finding(requirement.name, version)


def _extra(name: str, requirements: Sequence[Requirement]) -> DoctorFinding:
    purposes = {
        "ocr": "ocr build",
        "pdf": "PDF documents",
        "heic": "HEIC photographs",
        "eval": "eval judge",
        "serve": "serve",
        "lmms-eval": "lmms-eval",
        "cuda": "flash-attention",
        "deepspeed": "ZeRO",
        "liger": "model.kernels=liger",
    }
    missing = [one.name for one in requirements if check_requirement(one).state == "fault"]
    label = f"[{name}]"
    if not missing:
        return ok_finding(label, "is installed")
    purpose = f", needed for {purposes[name]}" if name in purposes else ""
    fix = f"run pip install '{_DISTRIBUTION}[{name}]' to use it"
    return note_finding(label, f"missing: {', '.join(missing)}{purpose}", fix)
