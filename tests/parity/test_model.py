"""The model gives the original's outputs: logits, losses and greedy answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavar_peft import ModelConfig, build_model

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def released(golden: Path) -> tuple[Any, Any]:
    return build_model(
        ModelConfig(
            checkpoint=str(golden / "model/llava-tiny-v1"),
            vision_tower=str(golden / "model/clip-tiny-336"),
            dtype="float32",
        )
    )


def _batches(golden: Path) -> list[dict[str, Any]]:
    described = json.loads((golden / "model/batches.json").read_text())
    outputs = np.load(golden / "model/outputs.npz")
    pixels = np.load(golden / "model/pixels_fp16.npz")
    batches = []
    for number in range(len(described["samples"])):
        names = ("input_ids", "attention_mask", "labels")
        batch = {name: torch.tensor(outputs[f"{number}/{name}"]).long() for name in names}
        rows = {row["row"]: row["key"] for row in described["pixel_key"] if row["batch"] == number}
        images = [
            torch.tensor(pixels[key]).float()
            for row, key in sorted(rows.items())
            if (batch["input_ids"][row] == 32000).any()
        ]
        if images:
            batch["pixel_values"] = torch.stack(images)
        expected = {name.split("/", 1)[1]: outputs[name] for name in outputs.files if name.startswith(f"{number}/")}
        batches.append({"inputs": batch, "expected": expected})
    return batches


@pytest.mark.slow
def test_logits_and_losses_equal_the_originals(golden: Path, released: tuple[Any, Any]) -> None:
    model, _ = released
    batches = _batches(golden)
    assert len(batches) == 6
    for batch in batches:
        inputs, expected = batch["inputs"], batch["expected"]
        with torch.no_grad():
            output = model(**inputs)
        assert abs(float(output.loss) - float(expected["loss"])) <= 1e-5
        logits = output.logits[expected["sup_b"], expected["sup_t"]]
        hidden = torch.tensor(expected["hidden_sup"])
        torch.testing.assert_close(logits, hidden @ model.lm_head.weight.T, atol=5e-5, rtol=0)
        torch.testing.assert_close(logits.logsumexp(-1), torch.tensor(expected["logsumexp"]), atol=5e-5, rtol=0)
        assert torch.equal(logits.argmax(-1), torch.tensor(expected["argmax"]).long())


def test_greedy_answers_equal_the_originals(golden: Path, released: tuple[Any, Any]) -> None:
    model, processor = released
    cases = json.loads((golden / "generate/generate.json").read_text())
    pixels = np.load(golden / "generate/pixels_fp16.npz")
    assert cases
    for case in cases:
        ids = processor.encode_question(case["query"])
        assert ids[0].tolist() == case["input_ids"]
        image = torch.tensor(pixels[case["pixel_key"]]).float()[None]
        with torch.inference_mode():
            made = model.generate(input_ids=ids, pixel_values=image, do_sample=False, max_new_tokens=24)
        assert made[0, ids.shape[1] :].tolist() == case["new_ids"]


def test_asking_by_file_prepares_images_as_run_llava_did(golden: Path, released: tuple[Any, Any]) -> None:
    from llavar_peft.inference.chat import Chat
    from llavar_peft.inference.engine import Engine

    model, processor = released
    assert processor.inference_image_mode == "pad_black"
    chat = Chat(Engine(model, processor))
    # Images whose pixels are not prepared better than in the original (no rotation, transparency or 16 bits).
    cases = [c for c in json.loads((golden / "generate/generate.json").read_text()) if "text_wide" in c["image"]]
    assert cases
    for case in cases:
        answer = chat.ask(golden / "model" / case["image"], case["query"], temperature=0.0, max_new_tokens=24)
        assert answer == case["text"].removesuffix("</s>").strip()


def test_a_saved_model_is_loaded_unchanged(golden: Path, released: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = released
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = build_model(ModelConfig(checkpoint=str(tmp_path), dtype="float32"))
    for (name, tensor), (other, same) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(tensor, same)
    assert its_processor.inference_image_mode == "pad_black"
    assert its_processor.encode_question("Read.").tolist() == processor.encode_question("Read.").tolist()


def test_auto_classes_load_a_saved_folder(released: tuple[Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llavar_peft.models.build_model import register

    model, processor = released
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    register()
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(model)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)
