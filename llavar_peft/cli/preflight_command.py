"""``llavar-peft estimate`` and ``doctor``: what a run needs, and what the machine offers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llavar_peft.cli import shared_options as shared
from llavar_peft.cli.output import print_table, say, say_json, with_released_key

if TYPE_CHECKING:
    from llavar_peft.preflight.estimate_stage import StageEstimate
    from llavar_peft.recipe.schema import Stage

_GIB = 2**30
_SIGNS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
_GRIDS = 10
"""Maximum number of numbers of tiles that are listed."""
_UNSUITABLE = 3  # exit status, as of other faults of the environment


def estimate(
    context: typer.Context,
    recipe: shared.RecipeArgument = None,
    overrides: shared.OverridesArgument = None,
    preset: shared.PresetOption = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of GPUs.")] = 1,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard/--replicate", help="Divide the model over the GPUs, or copy it to each. Default: divide it."
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", min=1, help="Memory of a GPU in GiB, to report whether each stage fits."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option("--tflops", min=0.1, help="TFLOP/s that a GPU achieves in practice, to estimate the time."),
    ] = None,
    as_json: shared.JsonOption = False,
) -> None:
    """Estimate the memory, steps, compute and time that a recipe needs.

    With --memory, report which stages fit, and what to change in those that do not.
    """
    chosen = shared.load_chosen_recipe(context, recipe, overrides, preset)
    from llavar_peft.models.quantized_checkpoint import prepare_recipe
    from llavar_peft.preflight.estimate_stage import estimate_stage, what_would_help
    from llavar_peft.preflight.gpu_fit import CUDA_BYTES, smallest_gpu

    chosen = prepare_recipe(chosen, download=False)
    found = [estimate_stage(chosen.model, stage, gpus=gpus, sharded=shard) for stage in chosen.stages]
    if as_json:
        say_json([_as_json(one, gpus, tflops) for one in found])
        return
    _print_memory(found)
    _print_work(found, gpus, tflops)
    fitting = smallest_gpu((one.memory.peak for one in found), gpus) or "none, the largest has 80 GB"
    say(f"Smallest common GPU: {fitting}. An image takes {found[0].image_tokens} tokens.")
    _print_images(chosen.stages, found)
    if any(one.lengths.records is None for one in found):
        say("The records were not found. Each is assumed to have an image and max_length tokens.")
    for stage in chosen.stages:
        if stage.save_every_steps is None:
            say(f"{stage.name}: a checkpoint is saved about every 30 minutes (save_every_steps is not set).")
    for stage, one in zip(chosen.stages, found, strict=True):
        if memory is None:
            continue
        limit = int(memory * _GIB) - CUDA_BYTES
        fits = "fits" if one.memory.peak <= limit else "does not fit"
        say(f"{stage.name}: {fits} in {memory:g} GiB, of which CUDA itself takes about 1.")
        if one.memory.peak > limit:
            for change, peak in what_would_help(chosen.model, stage, limit=limit, gpus=gpus, sharded=shard):
                say(f"  {change}: {peak / _GIB:.1f} GiB{', fits' if peak <= limit else ''}")


def doctor(
    output_dir: Annotated[Path, typer.Option("--output-dir", help="The folder for runs.")] = Path("runs"),
    as_json: shared.JsonOption = False,
) -> None:
    """Check this machine: packages, GPU, quantization, disk and limits.

    Each fault is printed with its fix. The exit status is 3 if there is a fault.
    """
    from llavar_peft.preflight.doctor_devices import check_devices
    from llavar_peft.preflight.doctor_machine import check_machine
    from llavar_peft.preflight.doctor_packages import check_packages

    found = []
    for finding in (*check_packages(), *check_devices(), *check_machine(output_dir)):
        found.append(finding)
        if not as_json:
            fix = f"\n      {'fix' if finding.state == 'fault' else 'hint'}: {finding.fix}" if finding.fix else ""
            say(f"{_SIGNS[finding.state]} {finding.name}: {finding.what}{fix}")
    if as_json:
        say_json([with_released_key(dataclasses.asdict(one)) for one in found])
    if any(one.state == "fault" for one in found):
        raise typer.Exit(_UNSUITABLE)


def _print_images(stages: Sequence[Stage], found: list[StageEstimate]) -> None:
    """Print the tokens of images in tiles, and the stages that have no room for an image."""
    if found[0].grid_tokens:
        say(f"Each image gets the largest grid that fits. Its tokens by its tiles: {_list_grids(found[0])}.")
    for stage, one in zip(stages, found, strict=True):
        if one.image_tokens >= stage.max_length:
            fix = "Raise it, add a smaller grid, or set pool: 2." if one.grid_tokens else "Raise it."
            say(
                f"{stage.name}: max_length ({stage.max_length:,}) has no room for an image, which takes at least "
                f"{one.image_tokens:,} tokens, and a question. {fix}"
            )


def _list_grids(one: StageEstimate) -> str:
    """Return the tokens of an image by the number of its tiles; of many numbers the first and the last ones."""
    each = [
        f"{tiles}: {least:,}" + (f"-{most:,}" if most > least else "")
        for tiles, (least, most) in one.grid_tokens.items()
    ]
    return ", ".join(each if len(each) <= _GRIDS else [*each[: _GRIDS // 2], "...", *each[-_GRIDS // 2 :]])


def _print_memory(found: list[StageEstimate]) -> None:
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "other")
    rows = [
        (
            one.stage, f"{one.trained:,}", f"{one.parameters:,}", f"{one.pass_tokens:,}",
            *(f"{getattr(one.memory, part) / _GIB:.2f}" for part in parts), f"{one.memory.peak / _GIB:.1f}",
        )
        for one in found
    ]  # fmt: skip
    print_table(("stage", "trained", "of", "tokens a pass", *(f"{part} GiB" for part in parts), "peak GiB"), rows)


def _print_work(found: list[StageEstimate], gpus: int, tflops: float | None) -> None:
    rows = []
    for one in found:
        seconds = _seconds(one, gpus, tflops)
        rows.append((
            one.stage, one.lengths.records, f"{one.step_tokens:,.0f}", f"{one.step_flops / 1e12:,.1f}", one.steps,
            None if seconds is None else f"{seconds:.2f}",
            None if seconds is None or one.steps is None else f"{seconds * one.steps / 3600:.1f}",
        ))  # fmt: skip
    print_table(("stage", "records", "tokens a step", "TFLOP a step", "steps", "s a step", "hours"), rows)


def _seconds(one: StageEstimate, gpus: int, tflops: float | None) -> float | None:
    return None if tflops is None else one.step_flops / (tflops * 1e12 * gpus)


def _as_json(one: StageEstimate, gpus: int, tflops: float | None) -> dict[str, Any]:
    fields = dataclasses.asdict(one)
    fields["memory"]["peak"] = one.memory.peak
    fields["lengths"]["pictures"] = fields["lengths"].pop("images")  # the key of version 0.1
    for name in ("image_tokens", "views", "counts"):
        del fields["lengths"][name]
    return {**fields, "step_seconds": _seconds(one, gpus, tflops)}
