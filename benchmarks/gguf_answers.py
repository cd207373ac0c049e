"""How many greedy answers of GGUF files in llama.cpp are those of the model that they were made from.

    python benchmarks/gguf_answers.py runs/quickstart/model model-gguf runs/quickstart/data/held_out

``llama-cpp-python`` has to be installed. Images are padded to squares first, because llama.cpp pads after it resizes
(``--as-they-are`` leaves them).
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image

from llavar_peft import load_chat

CLIP_MEAN = (122, 116, 104)
LONGEST = 24  # tokens of an answer


def pad(image: Image.Image) -> Image.Image:
    """Return an image in the middle of a square of CLIP's mean color."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), CLIP_MEAN)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def open_engine(folder: Path) -> Any:
    """Return llama.cpp with the two files of a folder."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import MTMDChatHandler

    projector = next(folder.glob("mmproj-*.gguf"))
    language = next(path for path in folder.glob("*.gguf") if path != projector)
    handler = MTMDChatHandler(str(projector), verbose=False, use_gpu=False)
    return Llama(str(language), chat_handler=handler, n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)


def ask_engine(engine: Any, image: Image.Image, question: str) -> str:
    """Return llama.cpp's most probable answer."""
    packed = io.BytesIO()
    image.save(packed, "png")
    url = "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    found = engine.create_chat_completion(
        [{"role": "user", "content": parts}], temperature=0, top_k=1, repeat_penalty=1.0, max_tokens=LONGEST
    )
    return str(found["choices"][0]["message"]["content"]).strip()


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the model's folder")
    parser.add_argument("gguf", type=Path, help="the folder that `convert --to gguf` wrote")
    parser.add_argument("data", type=Path, help="a folder with records.json and images")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--as-they-are", action="store_true", help="do not pad the images")
    options = parser.parse_args()
    records = json.loads((options.data / "records.json").read_text(encoding="utf-8"))[: options.count]
    chat, engine = load_chat(options.model, dtype="float32"), open_engine(options.gguf)
    equal = right = ours_right = 0
    for record in records:
        asked, truth = (turn["value"].replace("<image>", "").strip() for turn in record["conversations"][:2])
        image = Image.open(options.data / "images" / record["image"]).convert("RGB")
        image = image if options.as_they_are else pad(image)
        ours = chat.ask(image, asked, temperature=0.0, max_new_tokens=LONGEST).strip()
        theirs = ask_engine(engine, image, asked)
        equal, right, ours_right = equal + (ours == theirs), right + (theirs == truth), ours_right + (ours == truth)
    try:
        engine_version = version("llama-cpp-python")
    except PackageNotFoundError:
        engine_version = "of unknown version"
    print(f"llama-cpp-python {engine_version}, {platform.machine()}: {equal} of {len(records)} answers are the model's")
    print(f"right: {right} of llama.cpp's, {ours_right} of the model's")
    engine.close()


if __name__ == "__main__":
    main()
