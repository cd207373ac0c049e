"""The package's exports, imports, layers and docstrings."""

import ast
import json
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

import llavar_peft
from llavar_peft.errors import ConfigError

ROOT = Path(llavar_peft.__file__).parents[1]
in_checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the repository")


@pytest.mark.parametrize("name", llavar_peft.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(llavar_peft, name) is not None
    assert name in dir(llavar_peft)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'build_modle'"):
        _ = llavar_peft.build_modle  # type: ignore[attr-defined]


def test_every_public_name_has_a_module() -> None:
    assert {*llavar_peft._MODULES, "__version__"} == {*llavar_peft.__all__}


def test_importing_the_package_loads_no_heavy_library() -> None:
    script = "import json, sys, llavar_peft; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert not {"torch", "transformers", "pydantic", "yaml", "PIL"} & set(json.loads(done.stdout))


def test_recipes_need_neither_torch_nor_transformers() -> None:
    script = (
        "from llavar_peft import Recipe, load_recipe, lora; load_recipe('tiny')\n"
        "import json, sys; print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert not {"torch", "transformers", "PIL"} & set(json.loads(done.stdout))


def test_lmms_eval_finds_the_model() -> None:
    """The entry point of the installed package is checked without importing lmms-eval."""
    (entry,) = (one for one in entry_points(group="lmms_eval.models") if one.name == "llavar")
    spec = find_spec(entry.module)  # not imported, because it imports lmms-eval
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    (named,) = (
        keyword.value
        for call in ast.walk(defined[entry.attr])
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "simple_class_path"
    )
    path = ast.literal_eval(ast.unparse(named).removeprefix("f").replace("{__name__}", entry.module))
    model = defined[path.removeprefix(f"{entry.module}.")]
    assert isinstance(model, ast.ClassDef)
    methods = {one.name for one in model.body if isinstance(one, ast.FunctionDef)}
    assert {"generate_until", "loglikelihood", "generate_until_multi_round"} <= methods  # abstract in the base class


def tool(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@in_checkout
def test_layers() -> None:
    """A module imports only from lower layers; the list is in pyproject.toml."""
    pytest.importorskip("importlinter")
    tool(sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())")


@in_checkout
def test_everything_public_has_a_docstring() -> None:
    pytest.importorskip("interrogate")
    tool(sys.executable, "-m", "interrogate", "--config", "pyproject.toml", "llavar_peft")


def test_a_message_leaves_out_the_middle_of_very_long_values() -> None:
    error = ConfigError.at(
        "answers.jsonl:2", f"is an answer by {'x' * 50_000!r}, expected 'merged'", "choose another file"
    )
    assert len(str(error)) < 1200
    assert str(error).startswith("answers.jsonl:2: is an answer by 'xxx")
    assert "expected 'merged'. Fix: choose another file." in str(error)
    assert [fault.fix for fault in error.faults] == ["choose another file"]
