"""The Dockerfile and the development container name only what exists. No image is built here."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path

import pytest

import llavar_peft

ROOT = Path(llavar_peft.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "Dockerfile").is_file(), reason="needs the repository")


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, without comments and with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage, with those of the stage that it begins from."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, ()))
        else:
            found[list(found)[-1]].append((word, rest))
    return found


def extras() -> set[str]:
    section = (ROOT / "setup.py").read_text(encoding="utf-8").partition("EXTRAS_REQUIRE")[2]
    return set(re.findall(r'^    "([\w-]+)": \[', section, re.MULTILINE))


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    names = set(stages())
    for word, rest in instructions():
        if word != "COPY":
            continue
        if rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in names
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
    assert ignored[1] == "*"
    assert not [one for one in ignored if fnmatch.fnmatch("shared", one.removeprefix("!")) and one != "*"]


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_runs_the_command_as_an_ordinary_user(stage: str) -> None:
    steps = stages()[stage]
    words, commands = dict(steps), " ".join(rest for word, rest in steps if word == "RUN")
    assert words["USER"] == "llavar"
    assert f"useradd --create-home --uid 1000 {words['USER']}" in " ".join(
        rest for word, rest in steps if word == "RUN"
    )
    assert json.loads(words["ENTRYPOINT"]) == ["llavar-peft"]
    assert words["VOLUME"] == "/models"
    assert ("ENV", "HF_HOME=/models PYTHONUNBUFFERED=1") in steps
    installed = re.search(r"\.whl\)\[([\w,-]+)\]", commands)
    assert installed is not None
    assert set(installed[1].split(",")) <= extras()
    assert ("download.pytorch.org/whl/cpu" in str(steps)) == (stage == "cpu")


def test_the_health_check_asks_a_route_of_the_server() -> None:
    routes = (ROOT / "llavar_peft/serving/api/api_app.py").read_text(encoding="utf-8")
    for stage in ("cpu", "cuda"):
        asked = json.loads(dict(stages()[stage])["HEALTHCHECK"].partition("CMD ")[2])
        path = re.search(r"http://127\.0\.0\.1:8000(/\w+)", asked[2])
        assert path is not None
        assert f'"{path[1]}"' in routes
        compile(asked[2], "HEALTHCHECK", "exec")
        assert dict(stages()[stage])["EXPOSE"] == "8000"


def test_the_development_container_installs_the_development_extra() -> None:
    settings = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert "pip install -e '.[dev]'" in settings["postCreateCommand"]
    assert "dev" in extras()
