"""Pages from templates: everything escaped, nothing half written."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llavar_peft.atomic_files import staging_path, write_bytes
from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.page.run_figures import percent

MOST_BYTES: Final = 3_000_000
"""Of a page with its images."""


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


def write_page(path: Path, page: bytes) -> Path:
    """Write beside the old page, then puts the new one in its place, so that no reader meets half a page.

    Args:
        path: Where it goes.
        page: The page.

    Returns:
        ``path``.

    Raises:
        EnvironmentFaultError: It cannot be written there.
    """
    try:
        write_bytes(path, page)
    except OSError as error:
        with suppress(OSError):
            staging_path(path).unlink(missing_ok=True)
        raise EnvironmentFaultError.at(
            str(path), f"the page cannot be written ({error.strerror})", "free space there, or allow writing"
        ) from error
    return path
