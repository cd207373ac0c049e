"""What ``inference.py`` measures within one process: files of questions, second turns, weights in 4 bits.

    python benchmarks/inference_work.py TASK MODEL DATA OUT SETTINGS

``DATA`` is the folder that ``inference_inputs.py`` wrote, ``OUT`` an empty one, ``SETTINGS`` JSON. Prints JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from inference_original import answer_file

from llavar_peft.inference.answer_file import generate_answers
from llavar_peft.inference.batch_decoder import DecodingBatch, Row, stream_row
from llavar_peft.inference.chat import Chat, load_chat
from llavar_peft.inference.generation_request import PromptImage, Request, encode_messages, question_content
from llavar_peft.inference.token_sampling import Sampling

if TYPE_CHECKING:
    from llavar_peft.recipe.schema import Dtype, Quantization


def read_questions(data: Path) -> list[dict[str, Any]]:
    """The questions that ``write_questions`` wrote."""
    return [json.loads(line) for line in (data / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def _texts(answers: Path) -> list[str]:
    return [json.loads(line)["text"] for line in answers.read_text(encoding="utf-8").splitlines()]


def measure_questions(model: str, data: Path, out: Path, tokens: int, sizes: Sequence[int]) -> dict[str, Any]:
    """A file of questions in the original's way, and by ``generate_answers`` at each batch size.

    Args:
        model: The checkpoint.
        data: Questions and images.
        out: Gets the answers.
        tokens: At most for each answer.
        sizes: Of batches.

    Returns:
        By contender: ``seconds``, questions a second as ``rate``, and the ``answers``.
    """
    questions, images = data / "questions.jsonl", data / "images"
    asked, found = len(read_questions(data)), {}
    engine = load_chat(model).engine
    answer_file(engine, _some(questions, out), images, out / "rehearsal", max_new_tokens=tokens)
    began = time.perf_counter()
    answer_file(engine, questions, images, out / "original.jsonl", max_new_tokens=tokens)
    seconds = time.perf_counter() - began
    found["original"] = {"seconds": seconds, "rate": asked / seconds, "answers": _texts(out / "original.jsonl")}
    del engine
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
    for size in sizes:
        path = out / f"batch_{size}.jsonl"
        report = generate_answers(model, questions, images, path, sampling=sampling, batch_size=size)
        found[f"batch {size}"] = {
            "seconds": report.seconds,
            "rate": asked / report.seconds,
            "answers": _texts(path),
        }
    return found


def _some(questions: Path, out: Path) -> Path:
    first = out / "first.jsonl"
    first.write_text(questions.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    return first


def _timed(pieces: Iterator[str]) -> tuple[float, float, str]:
    """Seconds to the first piece and to the last, and the text."""
    began = time.perf_counter()
    text, first = "", None
    for piece in pieces:
        first = first or time.perf_counter() - began
        text += piece
    whole = time.perf_counter() - began
    return first or whole, whole, text


def measure_turns(model: str, data: Path, tokens: int, talks: int) -> dict[str, Any]:
    """The second turn of conversations: with what the first left behind, and with everything computed again.

    Args:
        model: The checkpoint.
        data: Questions and images.
        tokens: At most for each answer.
        talks: How many.

    Returns:
        ``kept`` and ``anew``: of each conversation seconds to the first piece and to the last; ``same`` answers.
    """
    chat, asked = load_chat(model), read_questions(data)
    found: dict[str, Any] = {"kept": [], "anew": [], "same": 0, "prompt_tokens": 0}
    greedy = Sampling(temperature=0.0, max_new_tokens=tokens)
    for number in range(talks + 1):  # the first is a rehearsal
        image = data / "images" / asked[number % len(asked)]["image"]
        first, second = (asked[(number + step) % len(asked)]["text"] for step in (0, 1))
        talk = chat.conversation(image)
        answer = talk.send(first, temperature=0.0, max_new_tokens=tokens)
        kept = _timed(talk.stream(second, temperature=0.0, max_new_tokens=tokens))
        anew = _timed(_second_turn(chat, image, (first, answer, second), greedy))
        if number:
            found["kept"].append(kept[:2])
            found["anew"].append(anew[:2])
            found["same"] += kept[2] == anew[2]
    return found


def _second_turn(chat: Chat, image: Path, said: tuple[str, str, str], sampling: Sampling) -> Iterator[str]:
    """The original's way: image, tower, and the whole conversation, from the beginning."""
    first, answer, second = said
    prompt_image = PromptImage.prepare(image, chat.engine.processor)
    turns: Any = [("human", question_content(first, prompt_image)), ("gpt", [answer]), ("human", [second])]
    request = Request(
        ids=encode_messages(chat.engine.processor, turns, [prompt_image]), images=[prompt_image], sampling=sampling
    )
    pieces: list[str] = []
    yield from stream_row(chat.engine, Row(request, chat.engine, pieces.append), pieces)


def measure_storage(model: str, data: Path, tokens: int, dtype: Dtype, quantize: Quantization | None) -> dict[str, Any]:
    """Load a model stored in one way and answers all questions.

    Args:
        model: The checkpoint.
        data: Questions and images.
        tokens: At most for each answer.
        dtype: Of the weights that are not quantized.
        quantize: How the language model's layers are.

    Returns:
        ``dtype``, ``load`` seconds, ``weights`` bytes, ``peak`` bytes over imports (on a GPU, of its memory), tokens a
        second as ``rates`` by batch size, and the answers' ``texts`` and ``ids``.
    """
    before, began = _peak(), time.perf_counter()
    chat = load_chat(model, dtype=dtype, quantize=quantize)
    load = time.perf_counter() - began
    plain, sampling = chat.engine.base_model, Sampling(temperature=0.0, max_new_tokens=tokens)
    requests = [
        chat.request(data / "images" / one["image"], one["text"], sampling=sampling) for one in read_questions(data)
    ]
    rates = {size: _decode(chat, requests, size) for size in (1, 8)}
    answers = chat.answer(requests, batch_size=8)
    return {
        "dtype": str(plain.dtype).removeprefix("torch."),
        "device": chat.engine.device.type,
        "load": load,
        "weights": plain.get_memory_footprint(),
        "peak": _peak() - before,
        "rates": rates,
        "texts": [answer.text for answer in answers],
        "ids": [answer.ids for answer in answers],
    }


def _decode(chat: Chat, requests: Sequence[Request], size: int) -> float:
    """Tokens a second while a batch is full, prompts not counted; the median of some batches."""
    rates = []
    for start in range(0, min(len(requests), 4 * size), size):
        rows = [Row(request, chat.engine) for request in requests[start : start + size]]
        batch, count = DecodingBatch(chat.engine), 0
        batch.join(rows)
        began = time.perf_counter()
        while batch.rows:
            count += len(batch.rows)
            batch.step()
        if count:
            rates.append(count / (time.perf_counter() - began))
    return statistics.median(rates) if rates else float("nan")


def _peak() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def main(task: str, model: str, data: str, out: str, settings: str) -> None:
    """Measure one task."""
    given = json.loads(settings)
    if task == "questions":
        found = measure_questions(model, Path(data), Path(out), given["tokens"], given["sizes"])
    elif task == "turns":
        found = measure_turns(model, Path(data), given["tokens"], given["talks"])
    else:
        found = measure_storage(model, Path(data), given["tokens"], given["dtype"], given["quantize"])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
