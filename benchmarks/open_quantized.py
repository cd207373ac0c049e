"""Compare opening a model that is stored in 4 bits with quantizing it when it is loaded: CPU time, duration, disk.

Each contender runs in a process of its own, in turn. The model has random weights in float16.

    python benchmarks/open_quantized.py [--width 1024] [--layers 8] [--rounds 5] [--out STEM]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rounds import describe_run, figure, ratios, spread
from weights import about

CONTENDERS = {"quantized when it is loaded": ("float16", "nf4"), "stored in 4 bits": ("nf4", "")}
"""The model's folder and the value of ``quantize``, by name."""
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


def write_models(folder: Path, width: int, layers: int) -> float:
    """Write a model in float16, the same in 4 bits, and a tiny one that imports what is needed.

    Returns:
        The CPU time of the conversion, in seconds.
    """
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
    return time.process_time() - started


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Open both models in turn, and return CPU and wall time of each round, and the size of the weights in bytes."""
    found: dict[str, Any] = {name: {"cpu": [], "wall": []} for name in CONTENDERS}
    for name, (model, _) in CONTENDERS.items():
        found[name]["bytes"] = sum(path.stat().st_size for path in (folder / model).glob("*.safetensors"))
    for _ in range(rounds):
        for name, (model, quantize) in CONTENDERS.items():
            arguments = [str(folder / model), quantize, str(folder / "tiny")]
            command = [sys.executable, "-c", _OPEN, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for clock, seconds in zip(("cpu", "wall"), json.loads(done.stdout.splitlines()[-1]), strict=True):
                found[name][clock].append(seconds)
    return found


def quantized_table(report: dict[str, Any]) -> str:
    """Format a report as Markdown."""
    found = report["found"]
    base = found[next(iter(CONTENDERS))]
    lines = [
        describe_run(report), "",
        f"{report['layers']} layers of width {report['width']}; written in 4 bits in {report['conversion']:.1f} CPU s.",
        "",
        "| | CPU s | ratio | wall s | ratio | MB of weights | ratio |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, one in found.items():
        cells = [name]
        for clock in ("cpu", "wall"):
            cells += [figure(spread(one[clock])), figure(ratios(one[clock], base[clock]))]
        cells += [f"{one['bytes'] / 1e6:,.1f}", f"{one['bytes'] / base['bytes']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table; with ``--out``, write it and the figures of every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args()
    command = " ".join(["python", "benchmarks/open_quantized.py", *sys.argv[1:]])
    report: dict[str, Any] = {"date": datetime.now(timezone.utc).date().isoformat(), "command": command, **about()}
    report.update(rounds=options.rounds, width=options.width, layers=options.layers, load_before=os.getloadavg())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="quantized-") as name:
        report["conversion"] = write_models(Path(name), options.width, options.layers)
        report["found"] = measure(Path(name), options.rounds)
    report.update(load_after=os.getloadavg(), seconds=time.perf_counter() - start)
    text = quantized_table(report)
    sys.stdout.write(text)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
