"""``llavar-peft estimate``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llavar_peft.cli.output import say, say_json
from llavar_peft.cli.tables import print_table
from llavar_peft.recipe.presets import load_recipe

if TYPE_CHECKING:
    from llavar_peft.preflight.estimate_stage import StageEstimate

_GIB = 2**30
_OUTSIDE = _GIB
"""CUDA's context and libraries take about this much, which PyTorch does not count."""


def estimate(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A YAML file, or a shipped recipe's name; optional with --preset.", metavar="RECIPE"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Single settings, e.g. model.quantize=nf4", metavar="[PATH=VALUE]...")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="How the last stage trains.")] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of them.")] = 1,
    shard: Annotated[
        bool | None, typer.Option("--shard/--replicate", help="Divide the model over them; the default with several.")
    ] = None,
    memory: Annotated[float | None, typer.Option("--memory", min=1, help="GiB of a GPU: says what fits.")] = None,
    tflops: Annotated[float | None, typer.Option("--tflops", min=0.1, help="Of a GPU in use, for the time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Tell what a recipe will take before it is paid for: memory by part, work, steps, time, and what fits."""
    settings = overrides or []
    if preset is not None and recipe is not None and "=" in recipe:
        settings, recipe = [recipe, *settings], None
    if recipe is None and preset is None:
        raise typer.BadParameter("give a RECIPE, a --preset, or both")
    expected = load_recipe(recipe, settings, preset=preset)
    from llavar_peft.preflight.estimate_stage import estimate_stage, what_would_help

    found = [estimate_stage(expected.model, stage, gpus=gpus, sharded=shard) for stage in expected.stages]
    if as_json:
        say_json([_as_json(one, gpus, tflops) for one in found])
        return
    _print_memory(found)
    _print_work(found, gpus, tflops)
    if any(one.lengths.records is None for one in found):
        say("Records that are not here are taken to be as long as max_length, each with a picture.")
    for stage, one in zip(expected.stages, found, strict=True):
        if memory is None:
            continue
        limit = int(memory * _GIB) - _OUTSIDE
        fits = "fits" if one.memory.peak <= limit else "does not fit"
        say(f"{stage.name}: {fits} in {memory:g} GiB, of which CUDA itself takes about 1.")
        if one.memory.peak > limit:
            for what, peak in what_would_help(expected.model, stage, limit=limit, gpus=gpus, sharded=shard):
                say(f"  {what}: {peak / _GIB:.1f} GiB{', fits' if peak <= limit else ''}")


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
    whole = dataclasses.asdict(one)
    whole["memory"]["peak"] = one.memory.peak
    return {**whole, "step_seconds": _seconds(one, gpus, tflops)}
