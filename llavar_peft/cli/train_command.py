"""``llavar-peft train`` and ``llavar-peft quickstart``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llavar_peft.cli.output import is_first_rank, print_table, say, say_next
from llavar_peft.cli.push_command import (
    BaseNameOption,
    PrivateOption,
    PushOption,
    check_push_option,
    push_result,
)
from llavar_peft.cli.shared_options import OverridesArgument, PresetOption, RecipeArgument, load_chosen_recipe
from llavar_peft.errors import ConfigError, DataError, EnvironmentFaultError, InterruptedRunError

if TYPE_CHECKING:
    from llavar_peft.recipe.schema import Recipe

_QUICKSTART_FOLDER = Path("runs/quickstart")


def quickstart(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", help="The folder for everything that is made.")
    ] = _QUICKSTART_FOLDER,
    tune: Annotated[
        Literal["full", "lora", "qlora"], typer.Option("--tune", help="The tuning method of stage 2.")
    ] = "full",
    parts: Annotated[
        Literal["llavar", "modern"],
        typer.Option("--parts", help="The parts: CLIP and LLaMA, or SigLIP and Qwen 2 with an MLP projector."),
    ] = "llavar",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the data and of the training order.")] = 0,
) -> None:
    """Train a tiny model to read drawn images, on a CPU in minutes.

    Run the same command again to resume.
    """
    from llavar_peft.training.quickstart import run_quickstart

    result = run_quickstart(output_dir, tune, seed=seed, parts=parts)
    if not is_first_rank():
        return
    say(f"exact match on unseen images  {result.exact_match:.1%}")
    say(f"  before any training         {result.before:.1%}")
    say(f"  with blank images           {result.blank_exact_match:.1%}")
    say(f"page   {result.page}")
    say(f"model  {result.model}")
    say(f'ask    llavar-peft ask --model {result.model} --image FILE "What does the sign say?"')


def train(
    context: typer.Context,
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    preset: PresetOption = None,
    stage: Annotated[
        list[str] | None, typer.Option("--stage", help="Run only this stage. Repeat the option for several stages.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start from the beginning instead of resuming the last run.")
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes", help="Resume even if the recipe, the records or the number of processes changed."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only run two steps of each stage on its longest records, save and resume, and report the memory, "
            "time and disk space needed.",
        ),
    ] = False,
    push: PushOption = None,
    private: PrivateOption = False,
    base_name: BaseNameOption = None,
) -> None:
    """Train the stages of a recipe.

    Run the same command again to resume an interrupted run.
    """
    chosen = load_chosen_recipe(context, recipe, overrides, preset)
    names = [part.name for part in chosen.stages]
    for name in stage or ():
        if name not in names:
            raise ConfigError.at("--stage", f"the recipe has no stage {name!r}", f"use one of {', '.join(names)}")
    if is_first_rank():  # each rank would ask the hub
        check_push_option(push, private, base_name, _bases(chosen))
    if dry_run:
        _run_dry(chosen, tuple(stage or ()))
        return
    from llavar_peft.models.rank_agreement import exit_together
    from llavar_peft.training.trainer import run_recipe

    try:
        folder = run_recipe(chosen, stages=stage or None, restart=restart, allow_changes=allow_changes)
    except InterruptedRunError:
        exit_together()
        raise
    exit_together()
    if is_first_rank():
        from llavar_peft.page.findings import find_in_run
        from llavar_peft.page.run_log import read_run

        say(str(folder))
        with suppress(DataError):  # a run that ended well has not failed because its figures cannot be read again
            say_next(find_in_run(read_run(Path(chosen.output_dir)).stages))
        push_result(folder, push, private, base_name)


def _bases(recipe: Recipe) -> list[str]:
    """Return what the result of a recipe will be made from: an adapter of a later stage from the stage before it."""
    from llavar_peft.recipe.schema import Lora

    model = recipe.model
    if len(recipe.stages) > 1 and isinstance(recipe.stages[-1].tune, Lora):
        return [recipe.stages[-2].name]
    return [name for name in (model.checkpoint, model.language_model, model.vision_tower) if name is not None]


def _run_dry(recipe: Recipe, stages: tuple[str, ...]) -> None:
    import shutil

    from llavar_peft.training.dry_run import dry_run

    rows, disk = [], 0
    for trial in dry_run(recipe, stages):
        kept = max(1, next(one.keep_checkpoints for one in recipe.stages if one.name == trial.stage))
        # A new checkpoint is written before the oldest one is deleted.
        disk += trial.result_bytes + (kept + 1) * trial.checkpoint_bytes
        rows.append((
            trial.stage, trial.longest, trial.tokens, f"{trial.peak_bytes / 2**30:.2f}", f"{trial.seconds:.2f}",
            trial.steps, f"{trial.projected / 3600:.1f}", trial.save_every, f"{trial.checkpoint_bytes / 1e9:.2f}",
        ))  # fmt: skip
    if not is_first_rank():
        return
    titles = (
        "stage", "longest record", "tokens a step", "peak GiB", "s a step", "steps", "hours in all",
        "steps a save", "checkpoint GB",
    )  # fmt: skip
    print_table(titles, rows)
    existing = next(one for one in Path(recipe.output_dir).absolute().parents if one.is_dir())
    free = shutil.disk_usage(existing).free
    say(f"disk: {disk / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free in {existing}")
    if disk > free:
        raise EnvironmentFaultError.at(
            recipe.output_dir,
            f"there is too little disk space (got {free / 1e9:.1f} GB, expected {disk / 1e9:.1f} GB)",
            "free disk space, or choose another output_dir",
        )
