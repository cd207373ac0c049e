"""Quantize the language model of an export to 4 bits with GPTQ, for transformers and vLLM.

GPTQ chooses the 4-bit numbers so that the outputs of the layers for given images change least. It needs
``pip install llmcompressor``:

    llavar-peft convert llavar-13b mine-hf --to hf-llava
    python examples/gptq.py mine-hf --images receipts --question "What is the total?" --out mine-w4a16
"""

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader

KEPT = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
"""Layers that are not quantized."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="the folder that `convert --to hf-llava` wrote")
    parser.add_argument(
        "--images", type=Path, required=True, help="a folder of images like those that will be asked about"
    )
    parser.add_argument("--question", required=True, help="a question that can be asked about each of them")
    parser.add_argument("--count", type=int, default=256, help="the number of images to use")
    parser.add_argument("--out", type=Path, required=True, help="the folder to create")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already")

    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(args.export, dtype="auto")
    processor = AutoProcessor.from_pretrained(args.export)

    def encode(path: Path) -> Any:
        image = {"type": "image", "image": Image.open(path).convert("RGB")}
        return processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": args.question}, image]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    samples = [encode(path) for path in sorted(args.images.iterdir())[: args.count]]
    oneshot(
        model=model,
        processor=processor,
        dataset=DataLoader(samples, batch_size=None),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=KEPT),
    )
    model.save_pretrained(args.out, save_compressed=True)
    processor.save_pretrained(args.out)

    # The names that were saved are not those of the modules in transformers 5.
    path = args.out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["ignore"] = KEPT
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
