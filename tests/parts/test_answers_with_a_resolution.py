"""The server and the commands give the answers of ``Chat.ask``, with tiles and with cross-attention."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from llavar_peft import CrossAttention, Projector, Tiles, cli, load_chat
from llavar_peft.evaluation.vqa.scored_results import read_results
from llavar_peft.inference.chat import Chat
from tests.parts.tiled_parts import draw_image, save_plain_model, save_tuned
from tests.serving.server import MODEL, data_url, serving

GREEDY: Any = {"max_new_tokens": 5, "temperature": 0.0}
WIDE, TALL = draw_image(300, 80), draw_image(60, 200)


@pytest.fixture(
    scope="module", params=[Tiles(grid=((1, 2), (2, 1))), CrossAttention(grid=2)], ids=["tiles", "cross_attention"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose projector, newline and cross-attention were moved away from their first values."""
    root = tmp_path_factory.mktemp("model")
    return save_tuned(save_plain_model(root, request.param).added, Projector(), root / "trained")


@pytest.fixture(scope="module")
def chat(model: Path) -> Chat:
    return load_chat(model, dtype="float32")


def _said(text: str, *images: Image.Image) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for image in images:
        data = io.BytesIO()
        image.save(data, "PNG")
        parts.append({"type": "image_url", "image_url": {"url": data_url(data.getvalue())}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _post(url: str, messages: list[dict[str, Any]], **options: Any) -> str:
    body = {"model": MODEL, "max_tokens": 5, "temperature": 0, "messages": messages, **options}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).raise_for_status().text


def _answer(url: str, messages: list[dict[str, Any]]) -> str:
    return str(json.loads(_post(url, messages))["choices"][0]["message"]["content"])


@pytest.mark.slow
def test_the_server_answers_as_a_chat(chat: Chat) -> None:
    asked = [("What?", (WIDE,)), ("What?", (TALL,)), ("Which is older?", (WIDE, TALL)), ("And this?", (TALL, TALL))]
    alone = [chat.ask(list(images), text, **GREEDY) for text, images in asked]
    assert len(set(alone)) > 1
    talk = chat.conversation(WIDE)
    turns = [talk.send("What?", **GREEDY), talk.send("And both?", TALL, **GREEDY)]
    said = [_said("What?", WIDE), {"role": "assistant", "content": turns[0]}, _said("And both?", TALL)]
    with serving(chat) as (url, _), ThreadPoolExecutor(5) as pool:
        together = [pool.submit(_answer, url, [_said(text, *images)]) for text, images in asked]
        streamed = pool.submit(_post, url, [_said("Which is older?", WIDE, TALL)], stream=True)
        assert [one.result() for one in together] == alone
        assert _answer(url, said) == turns[1]
        lines = [line.removeprefix("data: ") for line in streamed.result().split("\n\n") if line.startswith("data: {")]
    chunks = [choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"]]
    assert "".join(chunks) == alone[2]


@pytest.mark.slow
def test_the_commands_answer_as_a_chat(model: Path, chat: Chat, tmp_path: Path) -> None:
    asked = [("wide.png", WIDE, "What?"), ("tall.png", TALL, "And this?"), ("wide.png", WIDE, "Who wrote it?")]
    for name, image, _ in asked:
        image.save(tmp_path / name)
    expected = [chat.ask(image, text, **GREEDY) for _, image, text in asked]
    rows = [{"question_id": number, "image": name, "text": text} for number, (name, _, text) in enumerate(asked)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    greedy = ["--images", str(tmp_path), "--greedy", "--max-new-tokens", "5", "--batch-size", "2"]
    files = ["--questions", str(tmp_path / "questions.jsonl"), "--answers", str(tmp_path / "answers.jsonl")]
    assert cli.main(["generate", "--model", str(model), *files, *greedy]) == 0
    written = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert {row["question_id"]: row["text"] for row in written} == dict(enumerate(expected))

    data = [{"question": row["text"], "answers": ["a sign"], "text_height": 20, **row} for row in rows]
    (tmp_path / "dataset.json").write_text(json.dumps({"data": data}))
    out = tmp_path / "results.json"
    scored = ["--dataset", str(tmp_path / "dataset.json"), "--out", str(out)]
    assert cli.main(["eval", "vqa", "--model", str(model), *scored, *greedy]) == 0
    assert [record.answer for record in read_results(out).records] == expected
    assert cli.main(["eval", "diagnose", str(out)]) == 0
