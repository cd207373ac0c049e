"""``llavar-peft train``."""

from __future__ import annotations

from typing import Annotated

import typer

from llavar_peft.cli._output import is_first_rank, say
from llavar_peft.errors import ConfigError
from llavar_peft.recipes import load_recipe


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(help="A YAML file, or a shipped recipe's name; optional with --preset.", metavar="RECIPE"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Single settings, e.g. stages.0.optim.learning_rate=1e-3", metavar="[PATH=VALUE]..."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="How the last stage trains: qlora, dora, ...; see 'llavar-peft recipe list'."),
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option("--stage", help="Run only this stage; may be given several times.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again instead of going on.")] = False,
) -> None:
    """Train a recipe's stages, or go on where an earlier run stopped."""
    settings = overrides or []
    if preset is not None and recipe is not None and "=" in recipe:
        # A preset alone, completed by settings.
        settings = [recipe, *settings]
        recipe = None
    if recipe is None and preset is None:
        raise typer.BadParameter("give a RECIPE, a --preset, or both", ctx=context)
    wanted = load_recipe(recipe, settings, preset=preset)  # before torch is imported: a mistake is reported in a moment
    names = [part.name for part in wanted.stages]
    for name in stage or ():
        if name not in names:
            raise ConfigError.at(
                "--stage", f"{recipe or preset} has no stage {name!r}", f"use one of {', '.join(names)}"
            )
    from llavar_peft.training.trainer import run_recipe

    folder = run_recipe(wanted, stages=stage or None, restart=restart)
    if is_first_rank():
        say(str(folder))
