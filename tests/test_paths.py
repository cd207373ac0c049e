"""Paths: ``~`` means the user's home in every option, setting and argument."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import llavar_peft
from llavar_peft.cli.app import build_app
from llavar_peft.cli.shared_options import open_image_or_url, parse_adapters
from llavar_peft.data.image_files import open_image
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import open_records
from llavar_peft.errors import LlavarError
from llavar_peft.evaluation.judge.judge_reviews import read_reviews
from llavar_peft.evaluation.vqa.mme_ocr import read_answers
from llavar_peft.evaluation.vqa.scored_results import read_results
from llavar_peft.evaluation.vqa.vqa_questions import read_predictions, read_vqa_questions
from llavar_peft.inference.answer_file import generate_answers
from llavar_peft.models.build_model import load_processor
from llavar_peft.recipe import schema
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.recipe.validate import recipe_from_mapping
from llavar_peft.types import expand_home
from llavar_peft.weights.adapter.adapter_report import describe_adapter


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def all_commands() -> dict[str, Callable[..., Any]]:
    app = build_app()
    found = {str(one.name): one.callback for one in app.registered_commands}
    for group in app.registered_groups:
        assert group.typer_instance is not None
        found |= {f"{group.name} {one.name}": one.callback for one in group.typer_instance.registered_commands}
    return {name: callback for name, callback in found.items() if callback is not None}


@pytest.mark.parametrize("name", all_commands())
def test_every_path_of_every_command_may_begin_with_the_home(name: str, home: Path) -> None:
    command = all_commands()[name]
    received: dict[str, Any] = {}
    (cell,) = command.__closure__ or ()  # the command itself
    cell.cell_contents = lambda **options: received.update(options)
    kinds = {
        key: str(kind) for key, kind in typing.get_type_hints(inspect.unwrap(command)).items() if "Path" in str(kind)
    }
    command(**{key: [Path("~/x/")] if "list[" in kind else Path("~/x/") for key, kind in kinds.items()})
    assert received == {key: [home / "x"] if "list[" in kind else home / "x" for key, kind in kinds.items()}


def test_options_that_are_a_path_or_something_else(home: Path) -> None:
    assert parse_adapters(["~/run/adapter/", "name=~/b"]) == {"adapter": home / "run/adapter", "name": home / "b"}
    with pytest.raises(LlavarError, match=r"a\.png: no such file"):
        open_image_or_url("~/a.png")


def path_fields() -> list[tuple[type, str]]:
    classes = (schema.Recipe, schema.ModelConfig, schema.DataConfig)
    return [
        (cls, name)
        for cls in classes
        for name, kind in typing.get_type_hints(cls, include_extras=True).items()
        if "expanduser" in str(kind)
    ]


def test_the_paths_of_a_recipe_are_found() -> None:
    names = {name for _, name in path_fields()}
    assert names == {"output_dir", "language_model", "vision_tower", "checkpoint", "projector", "records", "images"}


@pytest.mark.parametrize(("cls", "name"), path_fields(), ids=lambda value: getattr(value, "__name__", value))
def test_every_path_of_a_recipe_may_begin_with_the_home(cls: type, name: str, home: Path) -> None:
    data: dict[str, Any] = {"records": "r.json"}
    model: dict[str, Any] = {"language_model": "x", "vision_tower": "y"} if name != "checkpoint" else {}
    stage = {
        "name": "s", "data": data, "tune": "projector", "optim": {"learning_rate": 1.0}, "global_batch_size": 1,
        "micro_batch_size": 1,
    }  # fmt: skip
    mapping: dict[str, Any] = {"model": model, "stages": [stage], "output_dir": "o"}
    {schema.Recipe: mapping, schema.ModelConfig: model, schema.DataConfig: data}[cls][name] = "~/x"
    recipe = recipe_from_mapping(mapping, "r")
    owner = {schema.Recipe: recipe, schema.ModelConfig: recipe.model, schema.DataConfig: recipe.stages[0].data}[cls]
    assert getattr(owner, name) == str(home / "x")


NAME = "~/nowhere/x.json"
OPENERS: dict[str, Callable[[], Any]] = {
    "load_chat": lambda: llavar_peft.load_chat(NAME),
    "build_model": lambda: llavar_peft.build_model(llavar_peft.ModelConfig(checkpoint=NAME)),
    "load_processor": lambda: load_processor(NAME),
    "merge_adapter": lambda: llavar_peft.merge_adapter(NAME, NAME, "~/out"),
    "make_delta": lambda: llavar_peft.make_delta(NAME, NAME, "~/out"),
    "apply_delta": lambda: llavar_peft.apply_delta(NAME, NAME, "~/out"),
    "verify_delta": lambda: llavar_peft.verify_delta(NAME, NAME),
    "export": lambda: llavar_peft.export(NAME, "~/out", to="llavar"),
    "describe_adapter": lambda: describe_adapter(NAME),
    "generate_answers": lambda: generate_answers("m", NAME, None, "~/a.jsonl"),
    "open_records": lambda: open_records(NAME),
    "open_records of a list": lambda: open_records([NAME]),
    "open_image": lambda: open_image(NAME),
    "ImageRoots": lambda: ImageRoots([NAME]),
    "load_recipe": lambda: load_recipe("~"),
    "read_results": lambda: read_results(NAME),
    "read_reviews": lambda: read_reviews(NAME),
    "read_answers": lambda: read_answers(NAME),
    "read_predictions": lambda: read_predictions(NAME),
    "read_vqa_questions": lambda: read_vqa_questions(NAME),
}


@pytest.mark.parametrize("name", OPENERS)
def test_every_path_argument_may_begin_with_the_home(name: str, home: Path) -> None:
    with pytest.raises(LlavarError) as caught:
        OPENERS[name]()
    assert str(home) in str(caught.value) or "~/nowhere" in str(caught.value)
    (home / "nowhere").mkdir()
    if name in ("open_records", "read_results", "read_vqa_questions", "open_image"):
        (home / "nowhere/x.json").write_text("[")
        with pytest.raises(LlavarError) as caught:
            OPENERS[name]()
        assert "no such file" not in str(caught.value)


def test_an_unknown_user_is_an_ordinary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_home("~no-such-user-here/x") == Path("~no-such-user-here/x")
    monkeypatch.chdir(tmp_path)
    Path("~no-such-user-here").mkdir()
    assert ImageRoots(["~no-such-user-here/"]).roots == (Path("~no-such-user-here"),)
    with pytest.raises(LlavarError, match="no such file"):
        load_recipe("~no-such-user-here/x.yaml")


def test_the_program_still_has_its_options() -> None:
    assert isinstance(typer.main.get_command(build_app()), typer.core.TyperGroup)
