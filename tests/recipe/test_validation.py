"""All faults of a recipe are reported together, each with its path and a fix."""

import copy
import dataclasses
import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavar_peft.errors import ConfigError
from llavar_peft.recipe.schema import DataConfig, Full, Lora, ModelConfig, OptimConfig, Projector, Recipe, Stage
from llavar_peft.recipe.schema_fields import fields_of, type_at
from llavar_peft.recipe.validate import recipe_from_mapping, recipe_to_mapping, validate_recipe

STAGE = {
    "name": "one",
    "data": {"records": "records.json"},
    "tune": "full",
    "optim": {"learning_rate": 1e-3},
    "global_batch_size": 8,
    "micro_batch_size": 4,
}
MAPPING = {"model": {"checkpoint": "llavar-13b"}, "stages": [STAGE], "output_dir": "runs/x"}


def changed(**values: Any) -> dict[str, Any]:
    """Return MAPPING with values set at paths: ``stages__0__epochs=2``."""
    mapping = copy.deepcopy(MAPPING)
    for path, value in values.items():
        node: Any = mapping
        *above, last = [int(key) if key.isdecimal() else key for key in path.split("__")]
        for key in above:
            node = node[key] if isinstance(key, int) else node.setdefault(key, {})
        node[last] = value
    return mapping


def problems(mapping: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        recipe_from_mapping(mapping, "recipe.yaml")
    header, *lines = str(caught.value).splitlines()
    assert header == f"recipe.yaml: {len(lines)} problem{'' if len(lines) == 1 else 's'}"
    assert len(caught.value.faults) == len(lines)
    for fault, line in zip(caught.value.faults, lines, strict=True):
        assert line == f"  {fault.where}: {fault.what}; {fault.fix}"
        assert fault.fix
    return [line.strip() for line in lines]


def test_a_valid_recipe_is_read() -> None:
    recipe = recipe_from_mapping(MAPPING, "recipe.yaml")
    assert recipe.stages[0].tune == Full()
    assert recipe.stages[0].data.records == "records.json"
    assert recipe == Recipe(
        model=ModelConfig(checkpoint="llavar-13b"),
        stages=(
            Stage(
                name="one",
                data=DataConfig(records="records.json"),
                optim=OptimConfig(learning_rate=1e-3),
                global_batch_size=8,
                micro_batch_size=4,
            ),
        ),
        output_dir="runs/x",
    )


def test_the_example_of_the_style_guide() -> None:
    stage = {**STAGE, "optim": {"learing_rate": 2e-5}}
    second = {**STAGE, "name": "two", "tune": {"type": "lora", "rnk": 8}, "epochs": "three", "max_steps": "three"}
    assert problems({**MAPPING, "stages": [stage, second]}) == [
        "stages.0.optim.learing_rate: unknown field; did you mean 'learning_rate'?",
        "stages.1.tune.rnk: unknown field; did you mean 'rank'?",
        "stages.1.epochs: expected a number, got 'three'; write a number such as 0.5",
        "stages.1.max_steps: expected an integer, got 'three'; write a whole number such as 1",
    ]


def test_types_and_combinations_are_reported_together() -> None:
    found = problems(changed(seed=True, model__quantize="nf4", stages__0__global_batch_size=7, stages__0__epoch=2))
    assert [line.split(":")[0] for line in found] == [
        "stages.0.epoch",
        "seed",
        "stages.0.global_batch_size",
        "stages.0.tune",
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seed": True}, "seed: expected an integer, got true; write a whole number such as 1"),
        ({"seed": "3"}, "seed: expected an integer, got '3'; write 3"),
        ({"seed": 3.0}, "seed: expected an integer, got 3.0; write 3"),
        (
            {"stages__0__packing": 1},
            "stages.0.packing: expected true or false, got 1; write one of the two, without quotes",
        ),
        (
            {"seed": -1},
            (
                "seed: expected an integer from 0 to 4294967295, got -1; "
                "use the default, 0, or another value in this range"
            ),
        ),
        ({"stages__0__max_steps": "1e3"}, "stages.0.max_steps: expected an integer, got '1e3'; write 1000"),
        ({"stages__0__epochs": True}, "stages.0.epochs: expected a number, got true; write a number such as 0.5"),
        (
            {"stages__0__gradient_checkpointing": 1},
            "stages.0.gradient_checkpointing: expected one of true, false, 'auto', got 1; choose one of them",
        ),
        ({"stages__0__name": 2024}, "stages.0.name: expected a string, got 2024; put it in quotes"),
        (
            {"stages__0__data__records": 3},
            "stages.0.data.records: expected a string or a list of strings, got 3; put it in quotes",
        ),
        (
            {"stages__0__data__images": ["a", None]},
            "stages.0.data.images.1: expected a string, got nothing; write a name",
        ),
        ({"report_to": "wandb"}, "report_to: expected a list, got 'wandb'; write [wandb]"),
        (
            {"model__quantize": "nf5"},
            "model.quantize: expected one of 'nf4', 'int8', got 'nf5'; did you mean 'nf4'?",
        ),
        (
            {"model__quantize": False},
            "model.quantize: expected one of 'nf4', 'int8', got false; choose one of them, or leave the field out",
        ),
        (
            {"stages__0__tune": "lra"},
            "stages.0.tune: expected one of projector, full, lora, got 'lra'; did you mean 'lora'?",
        ),
        (
            {"stages__0__tune": {"rank": 8}},
            (
                "stages.0.tune: expected one of projector, full, lora, got a mapping; "
                "write for example tune: lora or tune: {type: lora, rank: 16}"
            ),
        ),
        ({"stages__0__tune": {"type": "full", "rank": 8}}, "stages.0.tune.rank: unknown field; only tune: lora has it"),
        ({"stages__0__tune": {"type": "full", "rnk": 8}}, "stages.0.tune.rnk: unknown field; only tune: lora has rank"),
        ({"stages__0__rank": 8}, "stages.0.rank: unknown field; it belongs at stages.N.tune.rank"),
        ({"stages__0": 7}, "stages.0: expected a mapping of fields, got 7; write its fields below it, indented"),
        ({"model": None}, "model: expected a mapping of fields, got nothing; write its fields below it, indented"),
        ({"stages": []}, "stages: expected at least one entry, got an empty list; add an entry"),
    ],
)
def test_wrong_types(values: dict[str, Any], expected: str) -> None:
    assert problems(changed(**values)) == [expected]


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"output_dir": " "}, "output_dir"),
        ({"model": {}}, "model"),
        ({"model": {"vision_tower": "clip"}}, "model"),
        ({"model": {"language_model": "vicuna"}}, "model.vision_tower"),
        ({"model": {"language_model": "vicuna", "vision_tower": "clip", "checkpoint": "x"}}, "model.checkpoint"),
        ({"model__image_mode": "square"}, "model.image_mode"),
        ({"model__attention": "flash_attention_2", "model__dtype": "float32"}, "model.attention"),
        ({"model__quantize": "int8"}, "stages.0.tune"),
        ({"model__quantize": "nf4", "stages__0__tune": {"type": "lora", "variant": "pissa"}}, "stages.0.tune.variant"),
        ({"model__dtype": "bfloat16", "stages__0__precision": "fp16"}, "stages.0.precision"),
        ({"model__dtype": "float16", "stages__0__precision": "bf16"}, "stages.0.precision"),
        ({"stages__0__tune": {"type": "lora", "rank": 0}}, "stages.0.tune.rank"),
        ({"stages__0__tune": {"type": "lora", "alpha": 0}}, "stages.0.tune.alpha"),
        ({"stages__0__tune": {"type": "lora", "dropout": 1}}, "stages.0.tune.dropout"),
        (
            {
                "stages__0__tune": {"type": "lora", "train_projector": False},
                "stages__0__optim__projector_learning_rate": 1e-5,
            },
            "stages.0.optim.projector_learning_rate",
        ),
        ({"stages__0__optim__learning_rate": 0}, "stages.0.optim.learning_rate"),
        ({"stages__0__optim__learning_rate": float("nan")}, "stages.0.optim.learning_rate"),
        ({"stages__0__optim__learning_rate": float("inf")}, "stages.0.optim.learning_rate"),
        ({"stages__0__optim__projector_learning_rate": -1}, "stages.0.optim.projector_learning_rate"),
        ({"stages__0__optim__warmup_ratio": 1.5}, "stages.0.optim.warmup_ratio"),
        ({"stages__0__optim__weight_decay": -0.1}, "stages.0.optim.weight_decay"),
        ({"stages__0__optim__beta2": 1.0}, "stages.0.optim.beta2"),
        ({"stages__0__epochs": 0}, "stages.0.epochs"),
        ({"stages__0__max_steps": 0}, "stages.0.max_steps"),
        ({"stages__0__micro_batch_size": 3}, "stages.0.global_batch_size"),
        ({"stages__0__micro_batch_size": 0}, "stages.0.micro_batch_size"),
        ({"stages__0__max_length": 0}, "stages.0.max_length"),
        ({"stages__0__save_every_steps": 0}, "stages.0.save_every_steps"),
        ({"stages__0__keep_checkpoints": 0}, "stages.0.keep_checkpoints"),
        ({"stages__0__data__records": []}, "stages.0.data.records"),
        ({"stages__0__data__images": ["a", ""]}, "stages.0.data.images.1"),
        ({"stages__0__data__holdout": -1}, "stages.0.data.holdout"),
        ({"stages__0__data__holdout": 1.5}, "stages.0.data.holdout"),
        ({"stages__0__data__max_bad_share": 2}, "stages.0.data.max_bad_share"),
        ({"stages__0__data__workers": -1}, "stages.0.data.workers"),
        ({"stages__0__probe__every_steps": 5, "stages__0__data__holdout": 0}, "stages.0.probe.every_steps"),
        ({"stages__0__name": "a/b"}, "stages.0.name"),
        ({"stages__0__name": ".."}, "stages.0.name"),
        ({"stages__0__name": "Model"}, "stages.0.name"),
    ],
)
def test_values_out_of_range_or_contradictory(values: dict[str, Any], where: str) -> None:
    assert [line.split(":")[0] for line in problems(changed(**values))] == [where]


@pytest.mark.parametrize(
    "values",
    [
        {"model__quantize": "nf4", "stages__0__tune": "projector"},
        {"model__quantize": "nf4", "stages__0__tune": {"type": "lora", "variant": "dora"}},
        {"model__attention": "eager", "model__dtype": "float32"},
        {"model__dtype": "float32", "stages__0__precision": "bf16"},
        {"model__vision_tower": "clip"},
        {"stages__0__data__holdout": 64, "stages__0__probe__every_steps": 5},
        {"stages__0__data__holdout": 0.1},
        {"stages__0__data__workers": 0},
        {"stages__0__optim__max_grad_norm": 0},
        {"stages__0__name": "v1.2_a-b"},
    ],
)
def test_valid_combinations_are_accepted(values: dict[str, Any]) -> None:
    recipe_from_mapping(changed(**values), "recipe.yaml")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"stages__0__optim__warmup_ratio": 1.5},
            (
                "stages.0.optim.warmup_ratio: expected a number from 0 to 1, got 1.5; "
                "use the default, 0.03, or another value in this range"
            ),
        ),
        (
            {"stages__0__optim__learning_rate": "-2e-5"},
            "stages.0.optim.learning_rate: expected a number above 0, got -2e-05; use a value in this range",
        ),
        (
            {"stages__0__max_steps": 0},
            "stages.0.max_steps: expected an integer of 1 or more, got 0; use a value in this range",
        ),
        (
            {"stages__0__data__holdout": 1.5},
            (
                "stages.0.data.holdout: expected a share up to 1 or a whole number of records, got 1.5; "
                "use for example 0.01 or 64"
            ),
        ),
        (
            {"output_dir": " "},
            "output_dir: expected a non-blank string, got ' '; fill it in, or leave the field out if it is optional",
        ),
        (
            {"stages__0__name": "a/b"},
            "stages.0.name: expected a folder name, got 'a/b'; use at most 100 letters, digits, '-' and '_'",
        ),
        (
            {"stages__0__tune": {"type": "lora", "target": ["q_prj"]}},
            (
                "stages.0.tune.target.0: expected one of 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', "
                "'up_proj', 'down_proj', got 'q_prj'; did you mean 'q_proj'?"
            ),
        ),
        (
            {"stages__0__tune": {"type": "lora", "target": 3}},
            (
                "stages.0.tune.target: expected one of 'all-linear', 'attention', 'mlp' or a list, got 3; "
                "choose one of them"
            ),
        ),
        (
            {"stages__0__data__images": {"x": 1}},
            "stages.0.data.images: expected a string or a list of strings, got a mapping; write a name",
        ),
        (
            {"stages__0__gradient_checkpointing": []},
            "stages.0.gradient_checkpointing: expected one of true, false, 'auto', got a list; choose one of them",
        ),
        (
            {"stages__0__tune": {"type": "lora", "target": []}},
            "stages.0.tune.target: expected at least one entry, got an empty list; add an entry",
        ),
    ],
)
def test_broken_constraints_of_single_fields(values: dict[str, Any], expected: str) -> None:
    assert problems(changed(**values)) == [expected]


def test_a_broken_constraint_hides_no_other_fault_and_causes_none() -> None:
    values: dict[str, Any] = {"stages__0__max_length": 0, "stages__0__max_tokens": 100, "model__quantize": "nf4"}
    assert [line.split(":")[0] for line in problems(changed(**values))] == ["stages.0.max_length", "stages.0.tune"]


def test_stage_names_are_unique_without_case() -> None:
    mapping = {**MAPPING, "stages": [STAGE, {**STAGE, "name": "ONE"}]}
    assert [line.split(":")[0] for line in problems(mapping)] == ["stages.0.name", "stages.1.name"]


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "1", " 2e-5 ", "+2e-5", ".5e-3"])
def test_numbers_that_yaml_reads_as_text(text: str) -> None:
    mapping = changed(stages__0__optim__learning_rate=text)
    assert recipe_from_mapping(mapping, "recipe.yaml").stages[0].optim.learning_rate == float(text)


def test_integers_are_numbers() -> None:
    epochs = recipe_from_mapping(changed(stages__0__epochs=2), "recipe.yaml").stages[0].epochs
    assert epochs == 2.0
    assert isinstance(epochs, float)


def test_a_misspelled_field_hides_no_other_fault_and_causes_none() -> None:
    mapping = changed(model={"language_model": "vicuna", "vison_tower": "clip"}, stages__0__epochs=0)
    assert problems(mapping) == [
        "model.vison_tower: unknown field; did you mean 'vision_tower'?",
        "stages.0.epochs: expected a number above 0, got 0; use the default, 1.0, or another value in this range",
    ]


@pytest.mark.parametrize("mapping", [None, [], "text", 3])
def test_a_recipe_that_is_not_a_mapping_is_rejected(mapping: Any) -> None:
    assert len(problems(mapping)) == 1


def test_missing_fields() -> None:
    assert problems({}) == [
        "model: missing; add a line 'model: ...'",
        "stages: missing; add a line 'stages: ...'",
        "output_dir: missing; add a line 'output_dir: ...'",
    ]


def test_an_alias_that_contains_itself_is_rejected() -> None:
    stages: list[Any] = []
    stages.append(stages)
    assert problems({**MAPPING, "stages": stages})


def test_values_of_types_that_no_field_has_are_rejected() -> None:
    found = problems(changed(stages__0__name=datetime.date(2024, 1, 1), output_dir="\udcff"))
    assert [line.split(":")[0] for line in found] == ["stages.0.name", "output_dir"]


def test_the_input_is_not_changed() -> None:
    mapping = changed(stages__0__tune="lora", stages__0__epoch=3)
    before = copy.deepcopy(mapping)
    problems(mapping)
    assert mapping == before


# Python values


def recipe(**values: Any) -> Recipe:
    return dataclasses.replace(recipe_from_mapping(MAPPING, "recipe.yaml"), **values)


def test_python_values_are_checked_and_converted() -> None:
    stage = dataclasses.replace(recipe().stages[0], epochs=2, tune="lora", data=DataConfig(records=Path("a")))  # type: ignore[arg-type]
    given = recipe(stages=[stage], output_dir=Path("runs/y"))
    checked = validate_recipe(given)
    assert checked.output_dir == str(Path("runs/y"))
    assert checked.stages[0].tune == Lora()
    assert checked.stages[0].data.records == "a"
    assert isinstance(checked.stages, tuple)


@pytest.mark.parametrize(
    "values",
    [
        {"seed": "one"},
        {"stages": ()},
        {"stages": ("x",)},
        {"model": "llavar-13b"},
        {"model": ModelConfig},
        {"output_dir": b"bytes"},
        {"model": ModelConfig(checkpoint="x", quantize="nf4")},
    ],
)
def test_invalid_python_values_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^Recipe: 1 problem\n"):
        validate_recipe(recipe(**values))


def test_a_value_that_is_not_a_recipe_is_rejected() -> None:
    with pytest.raises(ConfigError, match="expected a Recipe, got dict"):
        validate_recipe(MAPPING)  # type: ignore[arg-type]


def test_config_error_is_a_value_error_with_exit_code_2() -> None:
    with pytest.raises(ValueError) as caught:
        recipe_from_mapping({}, "recipe.yaml")
    assert isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 2


# Round trip

# A "~" at the beginning is replaced by the home folder.
names = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0~"), min_size=1).filter(str.strip)
stages = st.builds(
    Stage,
    name=st.just("stage"),
    data=st.builds(
        DataConfig,
        records=names | st.lists(names, min_size=1).map(tuple),
        images=names | st.lists(names).map(tuple),
        holdout=st.floats(0, 1) | st.integers(1, 10**6).map(float),
    ),
    tune=st.just(Projector()) | st.just(Full()) | st.builds(Lora, rank=st.integers(1, 512), alpha=st.floats(0.1, 1e6)),
    optim=st.builds(
        OptimConfig, learning_rate=st.floats(0, 1, exclude_min=True), projector_learning_rate=st.none() | st.just(1e-5)
    ),
    epochs=st.floats(0, 1e9, exclude_min=True),
    max_steps=st.none() | st.integers(1, 2**40),
    global_batch_size=st.just(32),
    micro_batch_size=st.sampled_from([1, 2, 4]),
)
recipes = st.builds(
    Recipe,
    model=st.builds(ModelConfig, checkpoint=names),
    stages=st.tuples(stages),
    output_dir=names,
    seed=st.integers(0, 2**32 - 1),
    report_to=st.lists(names, max_size=2).map(tuple),
)


@settings(deadline=None)
@given(recipes)
def test_round_trip_is_exact(value: Recipe) -> None:
    assert recipe_from_mapping(recipe_to_mapping(value), "recipe") == value
    assert validate_recipe(value) == value


def test_every_field_is_found_by_its_path() -> None:
    mapping = recipe_to_mapping(recipe())
    assert type_at(mapping, ("stages", 0, "optim", "learning_rate")) is float
    assert type_at(mapping, ("stages", 0, "tune", "rank")) is None
    for name in fields_of(Stage):
        assert type_at(mapping, ("stages", 0, name)) is not None
