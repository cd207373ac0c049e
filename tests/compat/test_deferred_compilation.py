"""bitsandbytes is imported without PyTorch's compiler, and its functions are compiled when they are called."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llavar_peft.compat import deferred_compilation

_MODULE = """
import torch

@torch.compile
def plain(number):
    return number + 1

@torch.compile(dynamic=False)
def with_settings(number):
    return number + 2
"""


def test_functions_are_compiled_when_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def record(function: Any, **settings: Any) -> Any:
        compiled.append((function.__name__, settings))
        return function

    monkeypatch.setattr(torch, "compile", record)
    monkeypatch.setattr(deferred_compilation, "_COMPILING", "module_that_compiles")
    (tmp_path / "module_that_compiles.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("module_that_compiles")
    monkeypatch.delitem(sys.modules, "module_that_compiles")
    assert torch.compile is record
    assert compiled == []
    assert [module.with_settings(1), module.with_settings(2), module.plain(1)] == [3, 4, 2]
    assert compiled == [("with_settings", {"dynamic": False}), ("plain", {})]


def test_bitsandbytes_has_the_module_that_is_deferred() -> None:
    """The tests' settings defer it too, before anything imports it."""
    pytest.importorskip("bitsandbytes")
    module = sys.modules[deferred_compilation._COMPILING]
    assert module.__spec__ is not None
    assert isinstance(module.__spec__.loader, deferred_compilation._Loader)
    assert hasattr(module, "_try_torch_compile")
