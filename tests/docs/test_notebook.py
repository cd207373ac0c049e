"""The notebook runs from the first cell to the last."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

import llavar_peft

ROOT = Path(llavar_peft.__file__).parents[1]
NOTEBOOK = ROOT / "examples/receipts.ipynb"
_IN_KERNEL = "import shlex\nfrom llavar_peft.cli import main as _main"
_COMMAND = r'assert _main(shlex.split(f"\1")) == 0'


@pytest.mark.slow
@pytest.mark.skipif(not NOTEBOOK.is_file(), reason="needs the repository")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("rapidocr", reason="needs the extra ocr")
    # The commands in its cells are the ones installed beside this interpreter.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Fewer images and steps: what it prints is not compared.
    for told, short in (("--n 24 ", "--n 10 "), ("max_steps=20", "max_steps=4")):
        assert any(told in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(told, short)
    # The first command is run by the shell, the others in the kernel, which has imported everything already.
    lines = re.compile(r"^!llavar-peft (.*)$", re.MULTILINE)
    later = [cell for cell in notebook.cells if lines.search(cell.source)][1:]
    assert len(later) >= 3
    for cell in later:
        cell.source = f"{_IN_KERNEL}\n{lines.sub(_COMMAND, cell.source)}"
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    out = tmp_path / "runs/receipts-notebook/run"
    assert (out / "adapter/adapter_model.safetensors").is_file()
    assert (out / "report.html").is_file()
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [text for text in printed if text.startswith("error:")]
