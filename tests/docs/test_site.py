"""The documentation builds without warnings, and its generated parts are up to date."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import llavar_peft

ROOT = Path(llavar_peft.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="needs the repository")


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    recipes = (tmp_path / "site/recipes/index.html").read_text(encoding="utf-8")
    assert "gradient_checkpointing" in recipes
    assert "<!-- recipe fields -->" not in recipes


def test_benchmark_figures_are_those_of_the_results() -> None:
    """No figure in the README, docs/benchmarks.md and tables of other pages is typed by hand."""
    source = ROOT / "benchmarks/write_docs.py"
    spec = importlib.util.spec_from_file_location("write_docs", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.readme(text) == text
    resolution = (ROOT / "docs/resolution.md").read_text(encoding="utf-8")
    assert module.resolution_page(resolution) == resolution
    page = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
    assert module.engines_page(page) == page
    assert module.benchmarks_page() == (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
