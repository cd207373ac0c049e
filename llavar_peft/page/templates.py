"""Pages from templates: everything escaped, nothing half written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.page.figures import percent

MOST_BYTES: Final = 3_000_000
"""Of a page with its pictures."""


def render(template: str, **values: object) -> bytes:
    """Fills a template of this folder.

    Args:
        template: Its file's name.
        **values: What it shows; text of any kind, which is escaped.

    Returns:
        The page in UTF-8.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**values).encode("utf-8", errors="replace")


def aside_of(path: Path) -> Path:
    """Where a page is while it is written."""
    return path.with_name(f".{path.name}.part")


def put_page(path: Path, page: bytes) -> Path:
    """Writes beside the old page, then puts the new one in its place, so that no reader meets half a page.

    Args:
        path: Where it goes.
        page: The page.

    Returns:
        ``path``.

    Raises:
        EnvironmentFaultError: It cannot be written there.
    """
    aside = aside_of(path)  # one name: what a killed run left is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise EnvironmentFaultError.at(
            str(path), f"the page cannot be written ({error.strerror})", "free space there, or allow writing"
        ) from error
    return path
