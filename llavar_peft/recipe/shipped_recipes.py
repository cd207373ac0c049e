"""The shipped recipes and presets by name. Nothing here needs the schema, so that a shell completes names at once."""

from __future__ import annotations

import re
from pathlib import Path

_HERE = Path(__file__).parent
# setup.py packs the repository's examples/recipes into the package; a checkout reads that folder itself.
_CHECKOUT = _HERE.parents[1] / "examples" / "recipes"
_SHIPPED = next((folder for folder in (_HERE / "shipped", _CHECKOUT) if folder.is_dir()), _HERE / "shipped")
_SUFFIX = ".yaml"
_OUTPUT = re.compile(r"^output_dir:", re.MULTILINE)
"""A field that every recipe has and no preset."""


def list_recipes() -> dict[str, str]:
    """Return the names of the shipped recipes, each with its one-line description."""
    return {name: _first_line(text) for name, text in _shipped().items() if _OUTPUT.search(text)}


def list_presets() -> dict[str, str]:
    """Return the names of the shipped presets, each with its one-line description.

    A preset describes what one stage trains and how, but neither the model nor the data.
    """
    return {name: _first_line(text) for name, text in _shipped().items() if not _OUTPUT.search(text)}


def shipped_gpu(name: str) -> str:
    """Return the GPU that a shipped recipe or preset fits on, or an empty text.

    It is written in the file, because the estimate takes seconds; tests/preflight/test_gpu_fit.py recomputes it.
    """
    found = re.search(r"^# GPU: ([^;.]*)", read_shipped(name), re.MULTILINE)
    return found[1] if found is not None else ""


def shipped_names() -> list[str]:
    """Return the names of all shipped recipes and presets."""
    return sorted(file.stem for file in _SHIPPED.glob(f"*{_SUFFIX}"))


def read_shipped(name: str) -> str:
    """Return the YAML text of a shipped recipe or preset."""
    return (_SHIPPED / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def _shipped() -> dict[str, str]:
    return {name: read_shipped(name) for name in shipped_names()}


def _first_line(text: str) -> str:
    return text.partition("\n")[0].lstrip("# ")
