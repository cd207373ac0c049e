"""Starts training at 7B and 13B shapes on fake ranks, and prints one rank's host memory, in bytes.

Run by ``test_host_memory.py`` as ``host_memory.py LAYERS RANKS,SIZE,TUNE...``; 0 layers are all of the model's. In
place of the files, which the ranks of a node map together, are tensors that share the memory of one number; in place of
the GPU is the device ``meta``. Each case runs in a process of its own, forked after all imports.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from llavar_peft.compat.dependency_internals import enable_fsdp_on_cpu
from llavar_peft.models import build_model as building
from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.pending_weights import PendingWeights
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Full, Lora, ModelConfig, Projector
from llavar_peft.training import read_shards
from llavar_peft.weights.io.joined_rows import JoinedRows

TUNES = {
    "stage1": Projector(),
    "full": Full(),
    "lora": Lora(rank=64, alpha=128, train_image_rows=True),
    "dora": Lora(rank=64, alpha=128, variant="dora"),
}
GPU = torch.device("meta")


class HostMemory:
    """The peak of this process's memory since the last reset, in bytes."""

    def __init__(self) -> None:
        self.start = _resident("VmRSS")
        self.reset()

    def reset(self) -> None:
        """Begin a new peak."""
        Path("/proc/self/clear_refs").write_text("5")

    @property
    def peak(self) -> int:
        """The peak, without what the process held when this object was made."""
        return _resident("VmHWM") - self.start


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def stored_parts(config: LlavarConfig) -> tuple[SimpleNamespace, int]:
    """Return the parts of a float16 Vicuna with new rows, and the bytes of one copy."""
    shapes = building.expected_shapes(config)
    tensors: dict[str, Tensor | JoinedRows] = {
        name: torch.zeros((), dtype=torch.float16).expand(shape) for name, shape in shapes.items()
    }
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        rows, width = shapes[name]
        tensors[name] = JoinedRows(tensors[name][: rows - 3], torch.zeros(1, width).expand(3, width))
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    parts = SimpleNamespace(
        config=config,
        tensors=tensors,
        source="files",
        tokenizer=tokenizer,
        processor=lambda: SimpleNamespace(generation_ids={}),
    )
    return parts, sum(2 * tensor.numel() for tensor in tensors.values())


def measure(size: str, tune: str, layers: int, accelerator: Accelerator) -> dict[str, Any]:
    """Return one rank's peak before and while it reads, and the bytes of one copy of the model."""
    source = ModelConfig(language_model=f"vicuna-{size}", vision_tower="clip-vit-large-patch14-336", dtype="bfloat16")
    config = config_without_weights(source)
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    parts, copy = stored_parts(config)
    memory, before = HostMemory(), [0]
    copy_rows = PendingWeights.copy_rows

    def copy_and_count(*arguments: Any) -> None:
        # From here on the files count as well.
        if not before[0]:
            before[0] = memory.peak
            memory.reset()
        copy_rows(*arguments)

    with (
        patch.object(building, "_read_checked_parts", return_value=parts),
        patch.object(PendingWeights, "copy_rows", copy_and_count),
    ):
        model, _ = building.build_pending_model(source)
        if tune == "ddp":
            model.pending_weights.fill(model, GPU)
        else:
            # A shard on ``meta`` is one on the GPU: nothing is left to check.
            with patch.object(read_shards, "_check_filled"):
                read_shards.shard_pending(apply_tuning(model, TUNES[tune]), accelerator, "fsdp2")
    return {"before": before[0], "reading": memory.peak, "copy": copy}


def _start_ranks(ranks: int) -> Accelerator:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "FSDP_VERSION": "2",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    accelerator = Accelerator(cpu=True)
    enable_fsdp_on_cpu(accelerator)
    accelerator.state.device = GPU
    return accelerator


def main(layers: int, cases: list[str]) -> None:
    import peft  # noqa: F401 - for the children

    building.register()
    for case in cases:
        child = os.fork()
        if child == 0:
            try:
                ranks, size, tune = case.split(",")
                found = measure(size, tune, layers, _start_ranks(int(ranks)))
                print(json.dumps({"case": case, **found}), flush=True)  # noqa: T201
            except BaseException:  # noqa: BLE001 - the child must exit here
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{case} failed")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
