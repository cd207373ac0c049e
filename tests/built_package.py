"""Build the source distribution and the wheel, and use the wheel in an environment that contains nothing else of ours.

``python -m tests.built_package`` builds, installs the wheel with its dependencies in a new environment, and runs the
quickstart there. The tests install it without dependencies, and let it find those of the running environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
_SOURCES = ("llavar_peft", "examples/recipes", "adapters")
_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")


@dataclass(frozen=True)
class Built:
    """The files that ``python -m build`` wrote, and the names in them."""

    wheel: Path
    wheel_names: frozenset[str]
    source_names: frozenset[str]


def build_package(folder: Path, *, isolated: bool = False) -> Built:
    """Build the source distribution, and the wheel from it.

    Args:
        folder: For a copy of the sources, because setuptools writes among them, and for the results.
        isolated: Whether to install the build's requirements in an environment of its own.
    """
    copy = folder / "sources"
    for name in _SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        shutil.copyfile(ROOT / name, copy / name)
    how = [] if isolated else ["--no-isolation", "--skip-dependency-check"]
    run([sys.executable, "-m", "build", *how, "--outdir", str(folder / "dist"), str(copy)], folder)
    (source,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    with tarfile.open(source) as archive:
        inside = {PurePosixPath(*PurePosixPath(one.name).parts[1:]) for one in archive if one.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        names = frozenset(archive.namelist())
    return Built(wheel, names, frozenset(map(str, inside)))


def install(wheel: Path, folder: Path, *, dependencies: bool) -> Path:
    """Install a wheel in a new environment, and return its folder of programs.

    Args:
        wheel: The wheel, with extras in brackets if any.
        folder: The environment.
        dependencies: Whether to install those too; otherwise the environment finds those of the running one.
    """
    venv.create(folder, with_pip=dependencies)
    python = folder / "bin/python"
    if dependencies:
        run([str(python), "-m", "pip", "install", "--quiet", str(wheel)], folder)
        return python.parent
    run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-compile", "--no-deps", str(wheel)],
        folder,
    )
    (packages,) = folder.glob("lib/python3*/site-packages")
    # The folder's own .pth files, such as that of an editable installation, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python.parent


def run(arguments: list[str], folder: Path) -> str:
    """Run a program without any variable of Python's, and return what it prints.

    Raises:
        RuntimeError: It fails; with its output.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_TARGET"))}
    done = subprocess.run(arguments, cwd=folder, env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> None:
    """Go from the sources to the quickstart in a bare environment, and print each step's result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = build_package(folder, isolated=True)
        report = [f"built {built.wheel.name}: {len(built.wheel_names)} files"]
        programs = install(built.wheel, folder / "bare", dependencies=True)
        empty = folder / "empty"
        empty.mkdir()
        program = str(programs / "llavar-peft")
        for arguments in (["--version"], ["doctor"], ["quickstart", "--output-dir", "run", *sys.argv[1:]]):
            report.append(f"$ llavar-peft {' '.join(arguments)}\n{run([program, *arguments], empty)}")
            sys.stdout.write(report[-1])
            sys.stdout.flush()
        model = run([str(programs / "python"), "-c", _MODEL], empty).strip()
        image = next((empty / "run/data/held_out/images").iterdir())
        asked = ["ask", "--model", model, "--image", str(image), "--greedy", "What does the sign say?"]
        sys.stdout.write(f"$ llavar-peft ask ...\n{run([program, *asked], empty)}")


_MODEL = "import json; print(json.load(open('run/quickstart.json'))['model'])"

if __name__ == "__main__":
    main()
