"""``llavar-peft recipe``: the shipped recipes and presets, to look at and to start from."""

from __future__ import annotations

from typing import Annotated

import typer

from llavar_peft.cli.output import say
from llavar_peft.recipe.presets import list_presets, list_recipes, load_recipe, read_recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe


def list_shipped() -> None:
    """List the shipped recipes, and the presets that can be laid over one."""
    recipes, presets = list_recipes(), list_presets()
    width = max(map(len, [*recipes, *presets]), default=0)
    for kind, found in (("recipe", recipes), ("preset", presets)):
        for name, summary in found.items():
            say(f"{name:<{width}}  {kind}  {summary}")


def show(
    name: Annotated[str, typer.Argument(help="A shipped recipe's or preset's name, or a YAML file.", metavar="NAME")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Single settings to change; implies --full.", metavar="[PATH=VALUE]...")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print every field, defaults and explanations included, instead of the file.")
    ] = False,
    preset: Annotated[str | None, typer.Option("--preset", help="Laid over its last stage; implies --full.")] = None,
) -> None:
    """Print a recipe or preset: save it, change it, train it."""
    if not (full or overrides or preset):
        say(read_recipe(name).rstrip("\n"))
        return
    say(dump_recipe(load_recipe(name, overrides or (), preset=preset)).rstrip("\n"))
