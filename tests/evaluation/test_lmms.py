"""lmms-eval asks our model through its registry and requests.

``pip install --no-deps lmms-eval loguru`` is enough for it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavar_peft.errors import ConfigError, DataError

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed (pip install --no-deps lmms-eval loguru)")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from llavar_peft.evaluation.lmms_eval_model import manifest
from llavar_peft.inference.chat import load_chat
from tests.inference.reference import greedy_answers


@pytest.fixture(scope="module")
def model(checkpoint: Path, images: Path) -> Any:
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    arguments = {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    opened = registry.get_model_class("llavar").create_from_arg_string(f"pretrained={checkpoint}", arguments)
    opened.task_dict["reading"] = {"test": json.loads((images / "dataset.json").read_text())["data"]}
    return opened


def requests(model: Any, images: Path, count: int, **how: Any) -> list[Instance]:
    def visual(row: dict[str, Any]) -> list[Image.Image]:
        return [Image.open(images / "images" / row["image"])]

    rows = model.task_dict["reading"]["test"][:count]
    return [
        Instance(
            request_type="generate_until",
            arguments=(f"<image>\n{row['question']}", {"max_new_tokens": 6, **how}, visual, index, "reading", "test"),
            idx=0,
            metadata={"task": "reading", "doc_id": index, "repeats": 1},
        )
        for index, row in enumerate(rows)
    ]


def test_answers_are_those_of_generate(model: Any, images: Path, checkpoint: Path) -> None:
    rows = model.task_dict["reading"]["test"]
    chat = load_chat(checkpoint, device="cpu")
    direct = greedy_answers(
        chat.engine.base_model,
        chat.engine.processor,
        [row["question"] for row in rows],
        [images / "images" / row["image"] for row in rows],
        max_new_tokens=6,
    )
    assert model.generate_until(requests(model, images, 5, temperature=0, num_beams=1)) == direct
    stop = next(answer for answer in direct if answer)[-1]
    assert model.generate_until(requests(model, images, 5, until=[stop])) == [
        answer.split(stop)[0].strip() for answer in direct
    ]


def test_unsupported_requests_are_errors(model: Any, images: Path) -> None:
    with pytest.raises(ConfigError, match="num_beams: got 3, expected 1"):
        model.generate_until(requests(model, images, 1, num_beams=3))
    with pytest.raises(ConfigError, match="by likelihood"):
        model.loglikelihood([])
    (request,) = requests(model, images, 1)
    several = (*request.args[:2], lambda row: [Image.new("RGB", (8, 8))] * 2, *request.args[3:])
    request.arguments = several
    with pytest.raises(DataError, match="reading:0: has 2 images"):
        model.generate_until([request])
