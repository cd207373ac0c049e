"""``llavar-peft recipe``: the shipped recipes, to look at and to start from."""

from __future__ import annotations

from typing import Annotated

import typer

from llavar_peft.adapter_presets import list_presets, read_preset
from llavar_peft.cli._output import say
from llavar_peft.recipes import dump_recipe, list_recipes, load_recipe, read_recipe


def list_shipped() -> None:
    """List the shipped recipes and presets."""
    recipes, presets = list_recipes(), list_presets()
    width = max(map(len, (*recipes, *presets)), default=0)
    for name, summary in recipes.items():
        say(f"{name:<{width}}  {summary}")
    say("\npresets, for train --preset:")
    for name, summary in presets.items():
        say(f"{name:<{width}}  {summary}")


def show(
    name: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.", metavar="NAME")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Single settings to change; implies --full.", metavar="[PATH=VALUE]...")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print every field, defaults and explanations included, instead of the file.")
    ] = False,
) -> None:
    """Print a recipe or a preset: save it, change it, train it."""
    if name in list_presets() and not full and not overrides:
        say(read_preset(name).rstrip("\n"))
        return
    recipe = load_recipe(name, overrides or ())
    say((dump_recipe(recipe) if full or overrides else read_recipe(name)).rstrip("\n"))
