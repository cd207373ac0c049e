"""Parts that are saved once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.parts.tiny_parts import save_language_model, save_tower


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from a kind of language model to its folder."""
    root = tmp_path_factory.mktemp("language_models")
    return cache(lambda kind: str(save_language_model(kind, root / kind)))


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from a kind of vision tower to its folder."""
    root: Path = tmp_path_factory.mktemp("towers")
    return cache(lambda kind: str(save_tower(kind, root / kind)))
