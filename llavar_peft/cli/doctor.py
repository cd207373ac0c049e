"""``llavar-peft doctor``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli._output import say, say_json

_SIGNS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}


def doctor(
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Where runs are to be written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look whether this machine can do the work: packages, GPU, 4 bits, disk, limits; each fault with its mend."""
    from llavar_peft.doctor.devices import check_devices
    from llavar_peft.doctor.machine import check_machine
    from llavar_peft.doctor.packages import check_packages

    found = []
    for finding in (*check_packages(), *check_devices(), *check_machine(output_dir)):
        found.append(finding)
        if not as_json:
            mend = f"\n      {'mend' if finding.state == 'fault' else 'hint'}: {finding.mend}" if finding.mend else ""
            say(f"{_SIGNS[finding.state]} {finding.name}: {finding.what}{mend}")
    if as_json:
        say_json([dataclasses.asdict(one) for one in found])
    if any(one.state == "fault" for one in found):
        raise typer.Exit(3)
