"""The valid files that are damaged: those that version 0.1 wrote, other layouts of its model, and text files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from llavar_peft.datagen.ocr import read_image_folder
from llavar_peft.datagen.ocr.build_ocr_records import BuildSettings, build_records
from llavar_peft.datagen.ocr.ocr_lines import EngineName, OcrLine, Polygon
from llavar_peft.evaluation.heights.height_results import (
    HeightCurve,
    HeightPoint,
    HeightResults,
    write_height_results,
)
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.models.export_layout import export
from llavar_peft.weights.delta.delta_files import apply_delta
from tests.serving.server import data_url

TESTS = Path(__file__).parents[1]
QUESTION = {"question_id": 0, "image": "covers_000001.png", "text": "Which book?", "category": "read"}


class FixedOcr:
    """An OCR engine that reads the same text in every image."""

    name: EngineName = "rapidocr"
    version = "1"

    def find(self, image: Image.Image) -> tuple[Polygon, ...]:
        return tuple(line.polygon for line in self.read(image))

    def read(self, image: Image.Image) -> tuple[OcrLine, ...]:
        lines = ("GRAND OPENING TODAY", "Coffee 2.50")
        return tuple(OcrLine(text, ((2, n), (50, n), (50, n + 9), (2, n + 9)), 0.9) for n, text in enumerate(lines))


def read_images() -> None:
    """Run ``ocr build`` with the fixed engine."""
    real, read_image_folder.open_ocr_engine = read_image_folder.open_ocr_engine, lambda *_: FixedOcr()
    try:
        build_records(Path("data/images"), Path("ocr/read.json"), BuildSettings(workers=1))
    finally:
        read_image_folder.open_ocr_engine = real


def _write_lines(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_judge_files() -> None:
    folder = Path("judge")
    folder.mkdir()
    _write_lines(folder / "questions.jsonl", QUESTION, {**QUESTION, "question_id": 1, "category": "conv"})
    instance = {"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}
    _write_lines(
        folder / "contexts.jsonl",
        {"id": "1", "image": QUESTION["image"], "captions": ["A cover.", "THE BOOK"], "instances": [instance]},
    )
    rule = {"role": "Assistant", "prompt": "Rate them."}
    (folder / "rules.json").write_text(json.dumps({"read": rule, "conv": rule}))
    _write_lines(folder / "reference.jsonl", *({"question_id": n, "text": f"reference {n}"} for n in range(2)))
    _write_lines(folder / "answers.jsonl", *({"question_id": n, "text": f"ours {n}", "answer_id": "a"} for n in (1, 0)))
    review = {
        "id": 1, "question_id": 0, "answer1_id": 1, "answer2_id": "a", "category": "conv", "content": "8 9\nBecause.",
        "tuple": [8, 9], "metadata": {"judge_model": "judge", "judge_temperature": 0.2, "judge_max_tokens": 1024},
    }  # fmt: skip
    _write_lines(folder / "reviews.jsonl", review, {**review, "id": 2, "question_id": 1, "tuple": [5, 5.5]})
    (folder / "mme.txt").write_text("a.png\tIs it a book? Please answer yes or no.\tYes\tyes\n" * 2)
    _write_lines(folder / "captions.jsonl", {"image": "covers_000001.png", "caption": "A cover."})


def _write_heights() -> None:
    points = tuple(HeightPoint(height, 9 * height, 8 * height, 10 * height, 20, 20, 1) for height in (3.0, 5.0, 7.5))
    curves = tuple(HeightCurve(name, Setting(model=name), 336.0, points, {"not_found": 2}) for name in ("a", "b"))
    results = HeightResults("OCRVQA.json", "exact", 22, "omit", "the data set", curves)
    write_height_results(results, Path("letters.heights.json"))


def _write_weights() -> None:
    """Write other layouts of the model, its adapter and its projector."""
    export("merged", "stock", to="hf-llava", shard_size=60_000)
    apply_delta("language_model", "delta", "released", shard_size=60_000)
    shutil.copytree(TESTS / "golden/tokenization/small", "words")
    shutil.copytree("run/adapter", "bin_adapter")
    tensors = load_file("run/adapter/adapter_model.safetensors")
    torch.save(tensors, "bin_adapter/adapter_model.bin")
    for name in ("adapter_model.safetensors", "weights_checksums.json"):
        Path("bin_adapter", name).unlink()
    Path("projector").mkdir()
    for name in ("mm_projector.bin", "mm_projector.safetensors"):
        shutil.copy(f"run/stage1/model/{name}", "projector")


def _write_tables() -> None:
    """Write records as messages, and as tables with their images."""
    import datasets

    datasets.disable_progress_bars()
    part = [{"type": "image", "text": None}, {"type": "text", "text": "Which book?"}]
    answer = [{"type": "text", "text": "EXIT"}]
    image = Path("photos/page.png").read_bytes()
    messages = [{"role": "user", "content": part}, {"role": "assistant", "content": answer}]
    turns = [{"from": "human", "value": "<image>\nWhich book?"}, {"from": "gpt", "value": "EXIT"}]
    shown = {"type": "image_url", "image_url": {"url": QUESTION["image"]}}
    written = [
        {"id": "0", "messages": [{"role": "system", "content": "Be brief."}, *messages], "images": [QUESTION["image"]]},
        {"id": "1", "messages": [{"role": "user", "content": [shown, part[1]]}, messages[1]]},
        {"id": "2", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ]
    Path("data/messages.json").write_text(json.dumps(written))
    _write_lines(Path("data/messages.jsonl"), *written)
    Path("tables/folder").mkdir(parents=True)
    in_table = {"bytes": image, "path": "page.png"}
    one = datasets.Dataset.from_list([{"id": str(row), "messages": messages, "images": [in_table]} for row in range(3)])
    two = datasets.Dataset.from_list([{"id": str(row), "conversations": turns, "image": in_table} for row in range(3)])
    one.to_parquet("tables/messages.parquet")
    two.to_parquet("tables/conversations.parquet")
    two.to_parquet("tables/folder/train.parquet")
    one.save_to_disk("tables/saved")
    cells = [
        ("image", "question", "answers"),
        ("page.png", 'Which "book",\nplease?', "['EXIT', 'Exit']"),
        ("", "Hi", "Hello"),
    ]
    with Path("tables/rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(cells)
    with Path("tables/rows.tsv").open("w", newline="", encoding="utf-16") as file:
        csv.writer(file, delimiter="\t").writerows(cells)
    fields = json.dumps({"gt_parse": {"menu": [{"nm": "TEA", "price": "2"}]}})
    _write_lines(
        Path("tables/rows.jsonl"),
        {"image": "page.png", "ground_truth": fields},
        {"images": ["page.png"], "texts": [{"user": "Hi", "assistant": "Hello"}]},
        {"image": data_url(image), "questions": ["a", "b"], "answers": ["c", "d"]},
    )


def build_valid_files(folder: Path) -> None:
    """Write all files to a folder, which becomes the working directory."""
    with tarfile.open(TESTS / "fixtures/written_by_0_1/files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    os.chdir(folder)
    _write_weights()
    _write_judge_files()
    _write_heights()
    Path("ocr").mkdir()
    read_images()
    Path("photos").mkdir()
    photo = Image.radial_gradient("L").resize((60, 40)).convert("RGB")
    photo.save("photos/photo.jpg", quality=60)
    photo.save("photos/page.png")
    _write_tables()
