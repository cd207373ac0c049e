"""Names that users of version 0.1 could import are found in their present place, with a warning."""

from __future__ import annotations

import importlib

import pytest

import llavar_peft


@pytest.mark.parametrize(
    ("module", "name", "present"),
    [
        ("llavar_peft.models.build", "build_model", "llavar_peft.models.build_model.build_model"),
        ("llavar_peft.models", "LlavarProcessor", "llavar_peft.models.processing_llavar.LlavarProcessor"),
        ("llavar_peft.inference", "Picture", "llavar_peft.inference.generation_request.PromptImage"),
        ("llavar_peft.inference", "load_chat", "llavar_peft.inference.chat.load_chat"),
        ("llavar_peft.data", "prepare_image", "llavar_peft.data.image_preparation.prepare_image"),
        ("llavar_peft.training", "run_recipe", "llavar_peft.training.trainer.run_recipe"),
    ],
)
def test_a_released_name_is_found_with_a_warning(module: str, name: str, present: str) -> None:
    place, _, own = present.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is now {present}"):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(place), own)


def test_every_moved_name_exists() -> None:
    for package in ("data", "inference", "models", "models.build", "training"):
        module = importlib.import_module(f"llavar_peft.{package}")
        moved = module.__getattr__.__closure__[1].cell_contents
        assert len(moved) >= 2
        for name in moved:
            with pytest.warns(DeprecationWarning, match="is now"):
                assert getattr(module, name) is not None


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'bild'"):
        llavar_peft.models.bild  # noqa: B018
