"""Ctrl-C and SIGTERM while the program starts: no traceback, whatever is imported at that moment."""

from __future__ import annotations

import os
import py_compile
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from llavar_peft import cli

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")

_INTERRUPTED_AT = """
import os, sys
from llavar_peft.cli import run  # imports nothing that takes time
seen, moments = 0, {moments}

def hook(event, arguments):
    global seen
    if event == "import":
        seen += 1
        if seen in moments:
            os.kill(os.getpid(), {number})

sys.addaudithook(hook)
sys.argv[1:] = ["convert", "nowhere", "out", "--to", "llavar"]
run()
"""


def _run_interrupted(number: int, moments: set[int], folder: Path) -> subprocess.CompletedProcess[str]:
    code = _INTERRUPTED_AT.format(number=number, moments=moments)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("moments", [{1}, {200}, {200, 201}], ids=["first", "later", "twice"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_during_the_imports(number: int, moments: set[int], tmp_path: Path) -> None:
    done = _run_interrupted(number, moments, tmp_path)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", [800, 1500])
def test_ctrl_c_while_torch_and_transformers_are_imported(moment: int, tmp_path: Path) -> None:
    done = _run_interrupted(signal.SIGINT, {moment}, tmp_path)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_nothing_is_imported_before_signals_are_handled() -> None:
    heavy = ["typer", "rich", "click", "torch", "transformers", "llavar_peft.cli.app"]
    code = f"import sys, llavar_peft.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_main_leaves_the_handlers_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert cli.main(["--version"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    capsys.readouterr()


def test_a_truncated_compiled_module_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python truncates compiled modules silently when the disk is full; click reports their EOFError as "Aborted."."""
    source = tmp_path / "module_of_a_library.py"
    source.write_text("VALUE = 'text'\n")
    compiled = Path(py_compile.compile(str(source)))
    compiled.write_bytes(compiled.read_bytes()[:40])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("llavar_peft.cli.recipe_command.list_presets", lambda: import_module(source.stem))
    assert cli.main(["recipe", "list"]) == 3
    message = capsys.readouterr().err
    assert "a compiled module (.pyc) is damaged" in message
    assert "compileall" in message
