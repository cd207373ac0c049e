"""Compare opening a model that is stored in 4 bits with quantizing it when it is loaded: CPU time, duration, disk.

Each contender runs in a process of its own, in turn, five rounds. The model has random weights in float16.

    python benchmarks/open_quantized.py FOLDER [--width 1024] [--layers 8]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 5
_OPEN = """
import json, sys, time
import bitsandbytes, torch
from llavar_peft import ModelConfig, build_model
folder, quantize = sys.argv[1], sys.argv[2] or None
build_model(ModelConfig(checkpoint=sys.argv[3], dtype="float32"))
cpu, wall = time.process_time(), time.perf_counter()
build_model(ModelConfig(checkpoint=folder, quantize=quantize, dtype="float32"), device="cpu")
print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]))
"""


def write_models(folder: Path, width: int, layers: int) -> None:
    """Write a model in float16, the same in 4 bits, and a tiny one that imports what is needed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import llavar_peft
    from llavar_peft import ModelConfig, build_model, export

    tiny = Path(llavar_peft.__file__).parent / "assets/tiny"
    language = shutil.copytree(tiny / "language_model", folder / "language_model")
    settings = json.loads((language / "config.json").read_text(encoding="utf-8"))
    settings |= {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    settings |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).half().save_pretrained(language)
    for name, part in (("tiny", tiny / "language_model"), ("float16", language)):
        parts = ModelConfig(language_model=str(part), vision_tower=str(tiny / "vision_tower"), dtype="float16")
        model, processor = build_model(parts)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    started = time.process_time()
    export(folder / "float16", folder / "nf4", to="llavar", quantize="nf4")
    sys.stdout.write(f"conversion: {time.process_time() - started:.2f} CPU s\n")


def main() -> None:
    """Write the models, run the rounds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    write_models(given.folder, given.width, given.layers)
    contenders = {"quantized when it is loaded": ("float16", "nf4"), "stored in 4 bits": ("nf4", "")}
    found: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, (model, quantize) in contenders.items():
            arguments = [str(given.folder / model), quantize, str(given.folder / "tiny")]
            done = subprocess.run(
                [sys.executable, "-c", _OPEN, *arguments], capture_output=True, text=True, check=True, env=os.environ
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    for name, rounds in found.items():
        cpu = sorted(one[0] for one in rounds)
        size = sum(path.stat().st_size for path in (given.folder / contenders[name][0]).glob("*.safetensors"))
        least, middle, most = cpu[0], statistics.median(cpu), cpu[-1]
        sys.stdout.write(f"{name}: {least:.2f} / {middle:.2f} / {most:.2f} CPU s, {size / 1e6:.1f} MB\n")
    ratios = sorted(one[0] / other[0] for one, other in zip(*found.values(), strict=True))
    sys.stdout.write(f"CPU time, ratio: {ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}\n")


if __name__ == "__main__":
    main()
