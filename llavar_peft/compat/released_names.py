"""Names that version 0.1 had elsewhere: they are found, with a warning, for one release."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved_names(module: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module from which names have moved.

    Args:
        module: The module's ``__name__``.
        moved: The present place of each name, ``module`` or, where it was renamed, ``module:name``.
    """

    def find(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name)
        place, _, renamed = moved[name].partition(":")
        present = f"llavar_peft.{place}", renamed or name
        warnings.warn(f"{module}.{name} is now {'.'.join(present)}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(present[0]), present[1])

    return find
