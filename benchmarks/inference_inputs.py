"""The inputs of ``inference.py``: a model with random weights, and questions about drawn images."""

from __future__ import annotations

import json
import sys
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

SIZES: dict[str, tuple[dict[str, int], dict[str, int]] | None] = {
    "tiny": None,
    "small": (
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
    ),
    "7b": (
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
}
"""Language model and vision tower. ``tiny`` is the package's; the other towers have 336 pixels in patches of 14."""


def write_model(folder: Path, size: str) -> None:
    """Write a checkpoint of a size in ``SIZES`` with random weights and the tiny model's tokenizer.

    Only the projector of ``tiny`` is random.
    """
    import torch

    from llavar_peft import ModelConfig, build_model
    from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration

    parts = Path(str(package_files("llavar_peft") / "assets/tiny"))
    tiny = ModelConfig(
        language_model=str(parts / "language_model"), vision_tower=str(parts / "vision_tower"), dtype="float32"
    )
    model, processor = build_model(tiny, seed=0)
    shape = SIZES[size]
    if shape is not None:
        config, (text, tower) = model.config, shape
        config.text_config.update(
            {**text, "num_key_value_heads": text["num_attention_heads"], "initializer_range": 0.02}
        )
        config.text_config.head_dim = text["hidden_size"] // text["num_attention_heads"]
        config.vision_config.update({**tower, "image_size": 336, "patch_size": 14})
        config.image_seq_length = (336 // 14) ** 2
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlavarForConditionalGeneration(config)
        if torch.cuda.is_available():
            model = model.to(torch.bfloat16)
        images = processor.image_processor
        images.size, images.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
        processor.patch_size = 14
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_questions(folder: Path, count: int) -> list[dict[str, Any]]:
    """Draw images, and write questions about them in the original's format.

    Args:
        folder: The folder for ``images`` and ``questions.jsonl``.
        count: Number of questions.

    Returns:
        The questions, each with the right ``answer``.
    """
    from llavar_peft.datagen.synth.synth_settings import SynthSettings
    from llavar_peft.datagen.synth.write_synthetic import write_synthetic

    # Neither the quickstart's training images nor its held-out images have this seed.
    settings = SynthSettings(style="plain", seed=2_000_003, width=320, task="question")
    records = json.loads(write_synthetic(folder, count, settings).records.read_text())
    asked = []
    for number, record in enumerate(records):
        question, answer = (turn["value"] for turn in record["conversations"])
        words = question.replace("<image>", "").strip()
        asked.append({"question_id": number, "image": record["image"], "text": words, "answer": answer})
    lines = (json.dumps({key: one[key] for key in ("question_id", "image", "text")}) + "\n" for one in asked)
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    return asked


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.write("null\n")
