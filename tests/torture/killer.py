"""Trains in forked children, kills them with SIGKILL, lets the last one finish, and prints the counts as JSON.

Half of the kills happen at a random file operation inside a save, the others at a random time. Libraries are imported
once, before the fork, so that an attempt takes seconds.

Run by ``test_kills.py`` as ``killer.py RECIPE COUNT SEED``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llavar_peft import Trainer, build_model, load_recipe
from llavar_peft.recipe.schema import Recipe
from llavar_peft.training import stage_trainer

stage_trainer.__name__  # noqa: B018 - imported for the children: transformers, accelerate and peft come with it
_FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def _die_within_a_save(operation: int) -> None:
    """Make this process kill itself at the n-th operation on a file of a checkpoint."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _FILE_EVENTS and any(part in str(arguments[0]) for part in ("/.staging", "/checkpoint-")):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _start(recipe: Recipe, operation: int | None) -> int:
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - stays open until the child exits
        status = 1
        try:
            if operation is not None:
                _die_within_a_save(operation)
            model, processor = build_model(recipe.model, seed=recipe.seed)
            Trainer(model, processor, recipe).train()
            status = 0
        finally:
            os._exit(status)
    return child


def _wait(child: int, seconds: float | None) -> int | None:
    """Return the child's exit status, or None if it was killed."""
    if seconds is not None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


def main(path: str, count: int, seed: int) -> None:
    """Kill ``count`` times, and start again whenever a run finished."""
    gc.freeze()  # a child that collects garbage would copy all pages of the modules
    torch.set_num_threads(1)  # a forked child has no threads of its parent
    recipe = load_recipe(path)
    draw = random.Random(seed)
    started = time.perf_counter()
    if _wait(_start(dataclasses.replace(recipe, output_dir=recipe.output_dir + "-whole"), None), None) != 0:
        raise SystemExit("the run without kills failed")
    whole = time.perf_counter() - started
    killed = {"in a save": 0, "at a time": 0}
    rounds = 0
    while sum(killed.values()) < count:
        inside = killed["in a save"] <= killed["at a time"]
        # An early operation, so that the run does not finish; saving a step takes about thirty.
        child = _start(recipe, draw.randrange(1, 60) if inside else None)
        ended = _wait(child, None if inside else draw.uniform(0.0, 0.6 * whole))
        if ended is None:
            killed["in a save" if inside else "at a time"] += 1
        elif ended == 0:
            rounds += 1
            Path(recipe.output_dir).rename(f"{recipe.output_dir}-{rounds}")
        else:
            raise SystemExit(f"an attempt failed with status {ended}")
    if _wait(_start(recipe, None), None) != 0:
        raise SystemExit("the last attempt failed")
    print(json.dumps({**killed, "seconds": round(whole, 1)}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
