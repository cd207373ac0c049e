"""``llavar-peft doctor``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli.output import say, say_json

_SIGNS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}


def doctor(
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Where runs are to be written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look whether this machine can do the work: packages, GPU, 4 bits, disk, limits; each fault with its fix."""
    from llavar_peft.preflight.doctor_devices import check_devices
    from llavar_peft.preflight.doctor_machine import check_machine
    from llavar_peft.preflight.doctor_packages import check_packages

    found = []
    for finding in (*check_packages(), *check_devices(), *check_machine(output_dir)):
        found.append(finding)
        if not as_json:
            fix = f"\n      {'fix' if finding.state == 'fault' else 'hint'}: {finding.fix}" if finding.fix else ""
            say(f"{_SIGNS[finding.state]} {finding.name}: {finding.what}{fix}")
    if as_json:
        say_json([dataclasses.asdict(one) for one in found])
    if any(one.state == "fault" for one in found):
        raise typer.Exit(3)
