"""Render templates, with all values escaped, and write pages atomically."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llavar_peft.atomic_files import staging_path, write_bytes
from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.page.run_figures import percent

MOST_BYTES: Final = 3_000_000
"""Maximum size of a page with its images."""


def render(template: str, **values: object) -> bytes:
    """Render a template of this folder to UTF-8. Values may contain any text; it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**values).encode("utf-8", errors="replace")


def write_page(path: Path, page: bytes) -> Path:
    """Replace a page atomically, so that a reader never sees an incomplete one, and return its path.

    Raises:
        EnvironmentFaultError: The page cannot be written.
    """
    try:
        write_bytes(path, page)
    except OSError as error:
        with suppress(OSError):
            staging_path(path).unlink(missing_ok=True)
        raise EnvironmentFaultError.at(
            str(path),
            f"the page cannot be written ({error.strerror})",
            "free disk space, or allow writing to the folder",
        ) from error
    return path
