"""The measurements of ``inference.py`` that run in one process: files of questions, second turns, 4-bit weights.

    python benchmarks/inference_work.py TASK MODEL DATA OUT SETTINGS

``DATA`` is the folder that ``inference_inputs.py`` wrote, ``OUT`` an empty folder, ``SETTINGS`` JSON. It prints JSON.
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
from llavar_peft.inference.generation_request import PromptImage, Request, encode_messages
from llavar_peft.inference.token_sampling import Sampling

if TYPE_CHECKING:
    from llavar_peft.recipe.schema import Dtype, Quantization


def read_questions(data: Path) -> list[dict[str, Any]]:
    """Read the questions that ``write_questions`` wrote."""
    return [json.loads(line) for line in (data / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def _texts(answers: Path) -> list[str]:
    return [json.loads(line)["text"] for line in answers.read_text(encoding="utf-8").splitlines()]


def measure_questions(model: str, data: Path, out: Path, tokens: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Answer a file of questions by the original's method, and by ``generate_answers`` at each batch size.

    Args:
        model: The checkpoint.
        data: The folder of questions and images.
        out: The folder for the answers.
        tokens: Largest number of tokens in an answer.
        sizes: Batch sizes.

    Returns:
        By contender: ``seconds``, questions per second as ``rate``, and the ``answers``.
    """
    questions, images = data / "questions.jsonl", data / "images"
    asked, found = len(read_questions(data)), {}
    engine = load_chat(model).engine
    answer_file(engine, _first_question(questions, out), images, out / "warm_up", max_new_tokens=tokens)
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


def _first_question(questions: Path, out: Path) -> Path:
    first = out / "first.jsonl"
    first.write_text(questions.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    return first


def _timed(pieces: Iterator[str]) -> tuple[float, float, str]:
    """Return the seconds to the first piece and to the last, and the text."""
    began = time.perf_counter()
    text, first = "", None
    for piece in pieces:
        first = first or time.perf_counter() - began
        text += piece
    whole = time.perf_counter() - began
    return first or whole, whole, text


def measure_turns(model: str, data: Path, tokens: int, conversations: int) -> dict[str, Any]:
    """Measure the second turn of conversations, with the cache of the first turn and with everything recomputed.

    Args:
        model: The checkpoint.
        data: The folder of questions and images.
        tokens: Largest number of tokens in an answer.
        conversations: Number of conversations.

    Returns:
        In ``kept`` and ``recomputed``, the seconds to the first piece and to the last of each conversation; the number
        of ``same`` answers.
    """
    chat, asked = load_chat(model), read_questions(data)
    found: dict[str, Any] = {"kept": [], "recomputed": [], "same": 0, "prompt_tokens": 0}
    greedy = Sampling(temperature=0.0, max_new_tokens=tokens)
    for number in range(conversations + 1):  # the first is a warm-up
        image = data / "images" / asked[number % len(asked)]["image"]
        first, second = (asked[(number + step) % len(asked)]["text"] for step in (0, 1))
        talk = chat.conversation(image)
        answer = talk.send(first, temperature=0.0, max_new_tokens=tokens)
        kept = _timed(talk.stream(second, temperature=0.0, max_new_tokens=tokens))
        recomputed = _timed(_second_turn(chat, image, (first, answer, second), greedy))
        if number:
            found["kept"].append(kept[:2])
            found["recomputed"].append(recomputed[:2])
            found["same"] += kept[2] == recomputed[2]
    return found


def _second_turn(chat: Chat, image: Path, said: tuple[str, str, str], sampling: Sampling) -> Iterator[str]:
    """Answer the second turn as the original does: vision tower and the whole conversation from the beginning."""
    first, answer, second = said
    prompt_image = PromptImage.prepare(image, chat.engine.processor)
    asked = chat.engine.processor.conversation_template.question(first, 1)
    turns: Any = [("human", asked), ("gpt", [answer]), ("human", [second])]
    request = Request(
        ids=encode_messages(chat.engine.processor, turns, [prompt_image]), images=[prompt_image], sampling=sampling
    )
    pieces: list[str] = []
    yield from stream_row(chat.engine, Row(request, chat.engine, pieces.append), pieces)


def measure_storage(model: str, data: Path, tokens: int, dtype: Dtype, quantize: Quantization | None) -> dict[str, Any]:
    """Load a model in one storage format and answer all questions.

    Args:
        model: The checkpoint.
        data: The folder of questions and images.
        tokens: Largest number of tokens in an answer.
        dtype: Data type of the weights that are not quantized.
        quantize: Quantization of the language model's layers.

    Returns:
        ``dtype``, ``load`` seconds, ``weights`` bytes, ``peak`` bytes above those after the imports (of GPU memory if
        there is a GPU), tokens per second as ``rates`` by batch size, and the answers' ``texts`` and ``ids``.
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
    """Return the tokens per second of decoding, without prompts: the median of up to four batches."""
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
        found = measure_turns(model, Path(data), given["tokens"], given["conversations"])
    else:
        found = measure_storage(model, Path(data), given["tokens"], given["dtype"], given["quantize"])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
