"""The package's structure: every name says what it is without its folder, and no file is too small to be one."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from pathlib import Path

import llavar_peft

PACKAGE = Path(llavar_peft.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
SMALLEST = 40
RELEASED = {"llavar_peft.models.build"}
"""Paths of version 0.1 that are kept for users, and that nothing here imports."""


def _module(path: Path) -> str:
    return ".".join(("llavar_peft", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def _imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_file_names_are_unique() -> None:
    names = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_class_names_are_unique() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(_module(path))
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_no_small_file_has_a_single_user() -> None:
    users = {_module(path): 0 for path in FILES}
    for path in FILES:
        for name in _imported(path) & users.keys():
            users[name] += 1
    small = [
        _module(path)
        for path in FILES
        if path.name not in ("__init__.py", "__main__.py") and len(path.read_text("utf-8").splitlines()) < SMALLEST
    ]
    assert [module for module in small if users[module] <= 1 and module not in RELEASED] == []
