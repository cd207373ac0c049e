"""Measure one cell of ``gpu/train.py``, which runs this script in a separate process.

python train_cell.py CELL_AS_JSON
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from train_contenders import Cell, ours, stage_of
from train_model import SHAPES, Records, build, configuration
from transformers import TrainerCallback

from llavar_peft import Lora, Projector
from llavar_peft.models.build_model import expected_shapes, quantization_arguments
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.tuning import apply_tuning

GIB = 2**30


class Clock(TrainerCallback):
    """Records the time at which each optimizer step ends.

    Args:
        module: The functions of the device, such as ``torch.cuda``; None for the CPU.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the end of a step."""
        if self.module is not None:
            self.module.synchronize()
        self.ends.append(time.perf_counter())


def random_model(size: str, quantize: Any, device: torch.device) -> Any:
    """Return a model of random weights that are created on the device.

    Args:
        size: A key of ``SHAPES``.
        quantize: The field of ``ModelConfig``.
        device: The device.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if quantize is None:
        return build(SHAPES[size], device=device, dtype=dtype)
    config = configuration(SHAPES[size])
    state = {}
    for name, shape in expected_shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        whole = torch.nn.init.ones_ if name.endswith("weight") else torch.nn.init.zeros_
        state[name] = whole(tensor) if len(shape) < 2 else tensor.normal_(std=0.02)
    return LlavarForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": device},
        **quantization_arguments(quantize, dtype),
    ).train()


def flops(size: str, records: Any, *, rank: int | None) -> float:
    """Return the necessary floating-point operations of a training step, without recomputation.

    Counted are the forward pass and the backward pass to the inputs through every layer (the projector precedes them),
    with causal attention; weight gradients of adapters only; the head at supervised positions; and the tower's forward
    pass without its last layer. A multiplication and an addition count as two operations.

    Args:
        size: A key of ``SHAPES``.
        records: The items of the step.
        rank: Rank of LoRA on all linear layers; None if the language model is frozen.
    """
    shape = SHAPES[size]
    layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.inner
    adapters = 0 if rank is None else rank * (8 * shape.hidden + 3 * (shape.hidden + shape.inner))
    tower = 12 * shape.tower**2 * (shape.tower_layers - 1)
    total = 0.0
    for item in records:
        tokens, places = len(item.example.input_ids), shape.image_tokens + 1
        attention = 2 * tokens * shape.hidden  # scores and values, half of them masked
        each = 4 * (layer + adapters) + 2 * adapters + 3 * attention
        total += tokens * shape.layers * each + item.example.supervised * shape.words * shape.hidden * 4
        total += places * (2 * tower + 4 * places * shape.tower * (shape.tower_layers - 1))
    return total


def measure(cell: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Train some steps.

    Args:
        cell: A cell from ``gpu/train.py``.
        device: The device; None is the CUDA device or, without one, the CPU.

    Returns:
        Tokens and floating-point operations per second and peak memory in GiB, or the out-of-memory error.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu: Any = None if device.type == "cpu" else torch.get_device_module(device)
    batch, steps = cell["batch"], cell["steps"]
    model = random_model(cell["size"], cell["quantize"], device)
    tune = Projector() if cell["rank"] is None else Lora(rank=cell["rank"], alpha=2.0 * cell["rank"])
    if gpu is not None:
        gpu.empty_cache()
        if cell["cap_gib"]:
            whole = gpu.get_device_properties(0).total_memory
            gpu.set_per_process_memory_fraction(min(1.0, cell["cap_gib"] * GIB / whole))
        gpu.reset_peak_memory_stats()
    records = Records(cell["lengths"], batch * steps, SHAPES[cell["size"]], longest=cell["longest"])
    clock = Clock(gpu)
    with tempfile.TemporaryDirectory() as folder:
        given = Cell(stage=cell["name"], shape=SHAPES[cell["size"]], batch=batch, steps=steps, folder=Path(folder))
        precision = "fp32" if gpu is None else "bf16"
        stage = stage_of(given, tune=tune, packing=True, recompute=cell["recompute"], precision=precision)
        try:
            ours(given, records, clock, model=apply_tuning(model, tune), stage=stage).train()
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).splitlines()[0]}
    timed, first = records.items[2 * batch :], 1  # two steps warm up: only the second one plans recomputation
    seconds = clock.ends[-1] - clock.ends[first]
    return {
        "tokens_per_second": sum(len(item.example.input_ids) for item in timed) / seconds,
        "flops_per_second": flops(cell["size"], timed, rank=cell["rank"]) / seconds,
        "peak_gib": None if gpu is None else gpu.max_memory_allocated() / GIB,
        "reserved_gib": None if gpu is None else gpu.max_memory_reserved() / GIB,
        "device": "CPU" if gpu is None else gpu.get_device_name(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.argv[1]))) + "\n")
