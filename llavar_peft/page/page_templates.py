"""Render templates, with all values escaped, and write pages atomically."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llavar_peft.atomic_files import write_bytes
from llavar_peft.page.run_figures import percent

MOST_BYTES: Final = 3_000_000
"""Maximum size of a page with its images."""


def render(template: str, **values: object) -> bytes:
    """Render a template of this folder to UTF-8. Values may contain any text; it is escaped."""
    return _environment().get_template(template).render(**values).encode("utf-8", errors="replace")


@cache
def _environment() -> Environment:
    """Return the templates' environment, which compiles each of them once: a run writes its page many times."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment


def write_page(path: Path, page: bytes) -> Path:
    """Replace a page atomically, so that a reader never sees an incomplete one, and return its path.

    Raises:
        EnvironmentFaultError: The page cannot be written.
    """
    write_bytes(path, page)
    return path
