"""Training steps of the quickstart's model, in the process that ``startup.py`` measures.

python benchmarks/startup_steps.py SECONDS
python benchmarks/startup_steps.py --model FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import llavar_peft
from llavar_peft import ModelConfig, build_model
from llavar_peft.constants import IGNORE_INDEX, IMAGE_END_TOKEN, IMAGE_PATCH_TOKEN, IMAGE_START_TOKEN

PARTS = Path(llavar_peft.__file__).parent / "assets/tiny"
BATCH, TEXT = 4, 100  # records, tokens of each


def tiny_model() -> tuple[Any, Any]:
    """Return the quickstart's model and its processor, untrained."""
    parts = {name: str(PARTS / name) for name in ("language_model", "vision_tower")}
    return build_model(ModelConfig(**parts))


def write_model(folder: Path) -> None:
    """Write the model as ``model`` and an image as ``image.png``."""
    model, processor = tiny_model()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    Image.new("RGB", (320, 160), "white").save(folder / "image.png")


def measure(seconds: float) -> dict[str, float]:
    """Return the wall and CPU time of a step, over steps that take a number of seconds, three at least."""
    torch.manual_seed(0)
    model, processor = tiny_model()
    ids = processor.tokenizer.convert_tokens_to_ids([IMAGE_START_TOKEN, IMAGE_PATCH_TOKEN, IMAGE_END_TOKEN])
    patches = processor.num_image_tokens
    row = [1, ids[0], *[ids[1]] * patches, ids[2], *range(50, 50 + TEXT)]
    input_ids = torch.tensor([row] * BATCH)
    labels = input_ids.clone()
    labels[:, : patches + 3] = IGNORE_INDEX
    pixels = torch.randn(BATCH, 3, processor.image_side, processor.image_side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}
    model.train()
    done, wall, cpu = -1, 0.0, 0.0
    while done < 3 or time.perf_counter() - wall < seconds:
        if done == 0:  # after the first step
            wall, cpu = time.perf_counter(), time.process_time()
        model(**batch, pixel_values=pixels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall / done, "cpu": cpu / done, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    if sys.argv[1] == "--model":
        write_model(Path(sys.argv[2]))
    else:
        print(json.dumps(measure(float(sys.argv[1]))))
