"""Trains two steps of each stage on a model of random numbers, and prints the memory used, in bytes.

Run by ``test_estimate.py`` as ``peak.py RECIPE TOKENS``. Each stage runs in its own process, forked after all imports;
the allocator returns freed memory to the system.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.preflight.estimate_moments import compute_dtype, storage_dtype
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.recipe.schema import ModelConfig, Stage
from llavar_peft.training.supervised_loss import supervised_loss


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def measure(model: LlavarForConditionalGeneration, stage: Stage, tokens: int, autocast: torch.dtype | None) -> None:
    """Run two optimizer steps; in the second, gradients and states exist, as in a run."""
    trained = apply_tuning(model, stage.tune)
    if stage.gradient_checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    trained.train()
    enable_packing(model)
    trained_parameters = [one for one in trained.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained_parameters, lr=1e-4)
    side = model.config.vision_config.image_size
    lengths = (tokens // 4,) * 4
    ids = torch.randint(3, 1000, (1, tokens))
    patches, at = model.config.image_seq_length, 0
    for length in lengths:
        ids[0, at + 8 : at + 8 + patches] = model.config.image_token_id
        at += length
    labels = torch.where(ids == model.config.image_token_id, IGNORE_INDEX, ids)
    batch = {"input_ids": ids, "labels": labels, "lengths": lengths, "pixel_values": torch.zeros(4, 3, side, side)}
    for _ in range(2):
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss, count, _ = supervised_loss(trained, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def _in_a_child(config: LlavarConfig, expected: ModelConfig, stage: Stage, tokens: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            torch.manual_seed(0)
            before = _resident("VmRSS")
            model = LlavarForConditionalGeneration(config).to(storage_dtype(expected.dtype))
            Path("/proc/self/clear_refs").write_text("5")
            measure(model, stage, tokens, compute_dtype(stage.precision))
            print(stage.name, _resident("VmHWM") - before, flush=True)  # noqa: T201
        except BaseException:  # noqa: BLE001 - the child must exit here
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{stage.name} failed")


def main(path: str, tokens: str) -> None:
    import peft  # noqa: F401 - for the children

    torch.set_num_threads(1)  # a forked child has no threads of its parent
    recipe = load_recipe(path, [])
    for stage in recipe.stages:
        _in_a_child(config_without_weights(recipe.model), recipe.model, stage, int(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
