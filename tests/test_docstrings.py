"""Docstrings agree with the code: an argument that is described exists, and has the name that the code gives it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llavar_peft

PACKAGE = Path(llavar_peft.__file__).parent
_SECTION = re.compile(r"^Args:\n((?:[ \t]+.*\n|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^(\s+)(\*{0,2}\w+):\s")


def _described(docstring: str) -> list[str]:
    section = _SECTION.search(docstring + "\n")
    if section is None:
        return []
    entries = [match for line in section.group(1).splitlines() if (match := _ENTRY.match(line))]
    return [match.group(2).lstrip("*") for match in entries if match.group(1) == entries[0].group(1)]


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {argument.arg for argument in every if argument is not None}


def _faults(tree: ast.AST) -> list[str]:
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = _parameters(node)
        elif isinstance(node, ast.ClassDef):
            makers = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
            fields = {
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            }
            parameters = set().union(fields, *map(_parameters, makers))
            if not parameters:
                continue
        else:
            continue
        unknown = set(_described(ast.get_docstring(node) or "")) - parameters
        faults += [
            f"line {node.lineno}: {node.name} describes {name!r}, which it does not take" for name in sorted(unknown)
        ]
    return faults


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_described_arguments_exist(path: Path) -> None:
    assert _faults(ast.parse(path.read_text("utf-8"))) == []


def test_an_unknown_argument_is_found() -> None:
    source = 'def f(a):\n    """Do it.\n\n    Args:\n        b: Not there.\n    """\n'
    assert _faults(ast.parse(source)) == ["line 1: f describes 'b', which it does not take"]
