"""Every command, option and argument of version 0.1 is still accepted, with the same type and default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavar_peft.cli.app import build_app
from tests.cli.command_tree import describe_commands

RELEASED: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_name("options_0_1.json").read_text("utf-8"))
"""Written by ``describe_commands`` from the command line of version 0.1."""

# The default of --short-edge is replaced by --profile, which chooses the size of each image.
NEW_DEFAULTS: dict[str, Any] = {"--short-edge": None}


def missing(released: list[dict[str, Any]], present: list[dict[str, Any]]) -> list[str]:
    """Return what a command of 0.1 accepted and the present one does not accept in the same way."""
    faults = []
    arguments = [one for one in present if one["kind"] == "argument"]
    for old in released:
        if old["kind"] == "argument":
            new = arguments.pop(0) if arguments else None
        else:
            new = next((one for one in present if set(old["names"]) <= set(one["names"])), None)
        if new is None:
            faults.append(f"{old['names']}: missing")
            continue
        faults += [
            f"{old['names']}: {key} was {old[key]!r}, is {new.get(key)!r}"
            for key in old
            if key not in ("names", "choices") and _expected(old, key) != new.get(key)
            if not (key == "required" and old[key])  # what was required may become optional
        ]
        faults += [f"{old['names']}: no {choice}" for choice in old.get("choices", ()) if choice not in new["choices"]]
    return faults


def _expected(old: dict[str, Any], key: str) -> Any:
    return NEW_DEFAULTS.get(old["names"][0], old[key]) if key == "default" else old[key]


@pytest.fixture(scope="module")
def commands() -> dict[str, list[dict[str, Any]]]:
    return describe_commands(build_app())


@pytest.mark.parametrize("command", RELEASED)
def test_a_command_of_0_1_accepts_what_it_accepted(command: str, commands: dict[str, list[dict[str, Any]]]) -> None:
    assert command in commands
    assert missing(RELEASED[command], commands[command]) == []


def test_a_removed_or_changed_option_is_found() -> None:
    released = RELEASED["llavar-peft ask"]
    changed = [{**one, "default": 1} if "--seed" in one["names"] else one for one in released[1:]]
    assert missing(released, changed) != []
    assert any(fault.startswith("['--seed']: default was None") for fault in missing(released, changed))


@pytest.mark.parametrize("command", RELEASED)
def test_a_new_option_of_an_old_command_is_not_required(command: str, commands: dict[str, Any]) -> None:
    known = {name for one in RELEASED[command] for name in one["names"] if one["kind"] == "option"}
    new = [one for one in commands[command] if one["kind"] == "option" and not known & set(one["names"])]
    assert [one["names"] for one in new if one["required"]] == []
    arguments = [sum(one["kind"] == "argument" for one in tree[command]) for tree in (RELEASED, commands)]
    assert arguments[0] == arguments[1]
