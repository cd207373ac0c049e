"""``llavar-peft recipe``."""

from __future__ import annotations

from typing import Annotated

import typer

from llavar_peft.cli.output import say
from llavar_peft.cli.shared_options import complete_preset, complete_recipe_or_preset
from llavar_peft.recipe.shipped_recipes import list_presets, list_recipes, shipped_gpu


def recipe_list() -> None:
    """List the shipped recipes, and the presets that can be applied to one.

    Each has the smallest GPU that it fits on, by the estimate for its longest records.
    """
    recipes, presets = list_recipes(), list_presets()
    gpus = {name: shipped_gpu(name) for name in (*recipes, *presets)}
    widths = [max(map(len, column), default=0) for column in (gpus, gpus.values())]
    for kind, found in (("recipe", recipes), ("preset", presets)):
        for name, summary in found.items():
            say(f"{name:<{widths[0]}}  {kind}  {gpus[name]:<{widths[1]}}  {summary}")


def recipe_show(
    name: Annotated[
        str,
        typer.Argument(
            help="The name of a shipped recipe or preset, or a YAML file.",
            metavar="NAME",
            autocompletion=complete_recipe_or_preset,
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields to change. This implies --full.", metavar="[PATH=VALUE]...")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print all fields with their defaults and explanations.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", help="A preset to apply to the last stage. This implies --full.", autocompletion=complete_preset
        ),
    ] = None,
) -> None:
    """Print a recipe or preset as YAML, to save, edit and train."""
    from llavar_peft.recipe.presets import load_recipe, read_recipe
    from llavar_peft.recipe.recipe_yaml import dump_recipe

    # A preset alone is incomplete; everything else is shown only if it can be trained.
    complete = name not in list_presets() or full or overrides or preset
    loaded = load_recipe(name, overrides or (), preset=preset) if complete else None
    if loaded is not None and (full or overrides or preset):
        say(dump_recipe(loaded).rstrip("\n"))
    else:
        say(read_recipe(name).rstrip("\n"))
