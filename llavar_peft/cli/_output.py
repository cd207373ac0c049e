"""How commands speak: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
from typing import Any

import typer


def say(text: str) -> None:
    """Prints a result, unwrapped and uncoloured, so that it can be piped."""
    typer.echo(text)


def say_json(value: Any) -> None:
    """Prints a result for programs, as one JSON document in a line."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def complain(text: str) -> None:
    """Prints an error."""
    typer.secho(f"error: {text}", err=True, fg=typer.colors.RED)


def is_first_rank() -> bool:
    """Whether this process speaks for a run of several: torch.distributed's launchers set RANK."""
    return os.environ.get("RANK", "0") == "0"
