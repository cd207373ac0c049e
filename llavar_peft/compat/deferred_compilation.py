"""Import bitsandbytes without PyTorch's compiler, which it loads for functions that most runs never call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_COMPILING = "bitsandbytes.backends.default.ops"
"""The module whose functions are passed to ``torch.compile`` when it is imported, which takes over a second."""


def defer_compilation() -> None:
    """Let functions of bitsandbytes be compiled when they are first called, in this process.

    Replaces: nothing public. peft imports bitsandbytes where it is installed, for all models. Since: bitsandbytes 0.46,
    last seen in 0.50.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the module that compiles, and gives it a loader that defers it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own place; None for every other module."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _COMPILING else None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs a module while ``torch.compile`` returns functions that are compiled when they are first called."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        import torch

        plain = torch.compile
        torch.compile = _defer(plain)
        try:
            super().exec_module(module)
        finally:
            torch.compile = plain


def _defer(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    def compile_later(model: Callable[..., Any] | None = None, **settings: Any) -> Any:
        if model is None:  # as a decorator with arguments
            return lambda function: compile_later(function, **settings)
        compiled: list[Callable[..., Any]] = []

        @wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(model, **settings))
            return compiled[0](*args, **kwargs)

        return call

    return compile_later
