"""``llavar-peft train``."""

from __future__ import annotations

from typing import Annotated

import typer

from llavar_peft.cli.output import is_first_rank, say
from llavar_peft.cli.tables import print_table
from llavar_peft.errors import ConfigError, EnvironmentFaultError, InterruptedRunError
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.recipe.schema import Recipe


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
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on although recipe, records or number of processes changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Two steps of each stage on its longest records, a save and a resume.")
    ] = False,
) -> None:
    """Train a recipe's stages, or go on where an earlier run stopped."""
    settings = overrides or []
    if preset is not None and recipe is not None and "=" in recipe:
        # A preset alone, completed by settings.
        settings = [recipe, *settings]
        recipe = None
    if recipe is None and preset is None:
        raise typer.BadParameter("give a RECIPE, a --preset, or both", ctx=context)
    chosen = load_recipe(recipe, settings, preset=preset)  # before torch is imported: a mistake is reported in a moment
    names = [part.name for part in chosen.stages]
    for name in stage or ():
        if name not in names:
            raise ConfigError.at(
                "--stage", f"{recipe or preset} has no stage {name!r}", f"use one of {', '.join(names)}"
            )
    if dry_run:
        _try_out(chosen, tuple(stage or ()))
        return
    from llavar_peft.training.rank_agreement import exit_together
    from llavar_peft.training.trainer import run_recipe

    try:
        folder = run_recipe(chosen, stages=stage or None, restart=restart, allow_changes=allow_changes)
    except InterruptedRunError:
        exit_together()
        raise
    exit_together()
    if is_first_rank():
        say(str(folder))


def _try_out(recipe: Recipe, stages: tuple[str, ...]) -> None:
    import shutil
    from pathlib import Path

    from llavar_peft.preflight.dry_run import dry_run

    rows, disk = [], 0
    for trial in dry_run(recipe, stages):
        kept = max(1, next(one.keep_checkpoints for one in recipe.stages if one.name == trial.stage))
        # One more is written before the oldest goes.
        disk += trial.result_bytes + (kept + 1) * trial.checkpoint_bytes
        rows.append((
            trial.stage, trial.longest, trial.tokens, f"{trial.peak_bytes / 2**30:.2f}", f"{trial.seconds:.2f}",
            trial.steps, f"{trial.projected / 3600:.1f}", f"{trial.checkpoint_bytes / 1e9:.2f}",
        ))  # fmt: skip
    if not is_first_rank():
        return
    titles = (
        "stage",
        "longest record",
        "tokens a step",
        "peak GiB",
        "s a step",
        "steps",
        "hours in all",
        "checkpoint GB",
    )
    print_table(titles, rows)
    there = next(one for one in Path(recipe.output_dir).absolute().parents if one.is_dir())
    free = shutil.disk_usage(there).free
    say(f"disk: {disk / 1e9:.1f} GB wanted, {free / 1e9:.1f} GB free in {there}")
    if disk > free:
        raise EnvironmentFaultError.at(
            recipe.output_dir, f"wants {disk / 1e9:.1f} GB (got {free / 1e9:.1f} GB free)", "make room, or give another"
        )
