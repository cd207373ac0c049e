"""The functions that build stages accept the fields of the dataclasses, with their types, and no others."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable

import pytest

from llavar_peft.recipe.schema import DataConfig, Full, Lora, OptimConfig, ProbeConfig, Stage
from llavar_peft.recipe.stages import (
    FullOptions,
    LoraOptions,
    StageOptions,
    full_finetuning,
    lora,
    projector_pretraining,
)

DATA = DataConfig(records="r.json")


def fields(*classes: type) -> dict[str, object]:
    found: dict[str, object] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        found |= {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return {name: hint for name, hint in found.items() if name not in ("data", "tune", "optim", "type")}


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        (StageOptions, (Stage, OptimConfig)),
        (FullOptions, (Full, Stage, OptimConfig)),
        (LoraOptions, (Lora, Stage, OptimConfig)),
    ],
)
def test_options_are_the_fields_of_the_dataclasses(options: type, classes: tuple[type, ...]) -> None:
    assert typing.get_type_hints(options) == {**fields(*classes), "probe": ProbeConfig | None}


@pytest.mark.parametrize("make", [projector_pretraining, full_finetuning, lora])
def test_the_signature_lists_the_options_with_their_defaults(make: Callable[..., Stage]) -> None:
    stage = make(DATA)
    data, *options = inspect.signature(make).parameters.values()
    assert (data.name, data.annotation) == ("data", DataConfig)
    for parameter in options:
        owner = next(part for part in (stage, stage.optim, stage.tune) if hasattr(part, parameter.name))
        expected = None if parameter.name == "probe" else getattr(owner, parameter.name)
        assert (parameter.name, parameter.default) == (parameter.name, expected)
    names = {parameter.name for parameter in options}
    own = {projector_pretraining: StageOptions, full_finetuning: FullOptions, lora: LoraOptions}[make]
    assert names == set(typing.get_type_hints(own))


def test_every_option_reaches_its_field() -> None:
    stage = lora(DATA, target=("q_proj",), beta2=0.95, packing=False, projector_learning_rate=2e-5, probe=None)
    assert isinstance(stage.tune, Lora)
    assert stage.tune.target == ("q_proj",)
    assert (stage.optim.beta2, stage.optim.projector_learning_rate, stage.packing) == (0.95, 2e-5, False)
    assert stage.probe == ProbeConfig()


def test_an_unknown_option_is_a_type_error_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match=r"lora\(\) got an unexpected keyword argument 'rnk'; did you mean 'rank'\?"):
        lora(DATA, rnk=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"full_finetuning\(\) got an unexpected keyword argument 'rank'; "):
        full_finetuning(DATA, rank=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        full_finetuning(DATA, tune=Lora())  # type: ignore[call-arg]
