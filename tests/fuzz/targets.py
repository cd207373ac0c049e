"""What is damaged, and what then reads it. Commands run in the folder of the case, with its relative paths."""

from __future__ import annotations

import asyncio
import random
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from llavar_peft import ModelConfig, build_model, load_chat
from llavar_peft.data.check_records import preflight
from llavar_peft.data.image_files import open_image
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.message_records import as_record
from llavar_peft.data.record_store import open_records, parse_record
from llavar_peft.data.training_dataset import image_count, text_tokens
from llavar_peft.errors import LlavarError
from llavar_peft.evaluation.judge.judge_cases import read_cases
from llavar_peft.models.build_model import load_processor
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from llavar_peft.serving.api.api_app import create_app
from llavar_peft.serving.api.request_limits import RequestLimits
from llavar_peft.weights.adapter.adapter_report import describe_adapter, verify_adapter
from llavar_peft.weights.adapter.lora_updates import read_adapter
from llavar_peft.weights.io.tensor_blocks import open_weights, read_tensor
from llavar_peft.weights.io.tensor_table import read_tensor_table
from llavar_peft.weights.merge.merge_plan import plan_merge
from tests.fuzz.valid_files import read_images
from tests.serving.server import ask_body, call, data_url

Use = str | Callable[[], None]
"""A command line, or a function that reads the files in the working directory."""


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        copies: The valid files and folders that a case gets.
        victims: Globs of the files of which one is damaged, two now and then.
        uses: One is chosen for each case.
        weight: How many of all cases it gets.
    """

    copies: str
    victims: str
    uses: tuple[Use, ...]
    weight: int = 4


class DisagreementError(Exception):
    """Two readers have two opinions about the same file."""


def _opinion(use: Callable[[], object]) -> LlavarError | None:
    try:
        use()
    except LlavarError as error:
        return error
    return None


def _adapter_opinions() -> None:
    folder = next(path for path in (Path("run/adapter"), Path("bin_adapter")) if path.is_dir())
    show, verify, merge = (_opinion(partial(read, folder)) for read in (describe_adapter, verify_adapter, read_adapter))
    only_merge = "adapter with biases cannot be merged"
    if (verify is None) != (merge is None) and only_merge not in str(merge):
        raise DisagreementError(f"verify says {verify}; merge says {merge}")
    if show is not None and verify is None:
        raise DisagreementError(f"show says {show}; verify finds nothing")
    base = Path("run/stage1/model")
    verify = _opinion(partial(verify_adapter, folder, base=base))
    merge = _opinion(partial(plan_merge, base, folder))
    if (verify is None) != (merge is None) and only_merge not in str(merge):
        raise DisagreementError(f"verify --base says {verify}; merge says {merge}")


def _read_model_weights() -> None:
    for source in (Path("merged"), Path("stock"), Path("delta"), Path("projector")):
        if source.name == "projector":
            files = sorted(source.glob("*")) if source.is_dir() else []
        else:
            files = [source] if source.is_dir() else []
        for one in files:
            table = read_tensor_table(one)
            for entry in table.values():
                read_tensor(entry)
            store = open_weights(one)
            for name in store:
                store[name].float().sum()


def _same_as_library() -> None:
    """Accept no safetensors file that its own library refuses."""
    from safetensors import safe_open

    path = Path("merged/model.safetensors")
    table = read_tensor_table(path, checksums=False)
    with safe_open(path, framework="pt") as file:
        for name, entry in table.items():
            if not torch.equal(file.get_tensor(name).view(torch.uint8), read_tensor(entry).view(torch.uint8)):
                raise DisagreementError(f"{name} has other bytes")


def _build_from_parts() -> None:
    parts = ModelConfig(language_model="language_model", vision_tower="vision_tower", dtype="float32")
    build_model(parts)
    if Path("projector").is_dir():
        for path in sorted(Path("projector").glob("*")):
            build_model(ModelConfig(language_model="language_model", vision_tower="vision_tower", projector=str(path)))


def _apply_template() -> None:
    processor = load_processor("merged")
    processor(text="USER: What? ASSISTANT:")
    processor.encode_question("What?", image=False)


def _load_words() -> None:
    add_image_tokens(load_tokenizer("words"))


def _estimate_messages() -> None:
    _read_each("data/messages.json")


def _estimate_tables() -> None:
    for path in ("tables/messages.parquet", "tables/conversations.parquet", "tables/saved"):
        _read_each(path)


def _estimate_rows() -> None:
    for path in ("tables/rows.csv", "tables/rows.tsv", "tables/rows.jsonl"):
        _read_each(path)


def _read_each(path: str) -> None:
    """Read the records as training does before its first step."""
    store = open_records(path, cache_dir="cache")
    faulty = {fault.index for fault in preflight(store, ImageRoots(["."]))}
    for index in range(len(store)):
        if index not in faulty:
            raw = store[index]
            text_tokens(raw), image_count(raw)
            conversation = parse_record(raw, store.where(index))
            parse_record(as_record(conversation, [str(image) for image in conversation.images]), "x:0")


def _build_cases() -> None:
    folder = Path("judge")
    names = ("questions.jsonl", "contexts.jsonl", "rules.json", "reference.jsonl", "answers.jsonl")
    for case in read_cases(*(folder / name for name in names)):
        case.prompt(swapped=True)


def _open_images() -> None:
    for path in sorted(Path("photos").iterdir()):
        open_image(path)


@lru_cache(maxsize=1)
def serving_app() -> object:
    """Return a server's application over the model in the working directory."""
    return create_app(load_chat("merged").engine, name="m", limits=RequestLimits(new_tokens=2, seconds=3600))


def _send_request() -> None:
    body = Path("request.json").read_bytes()
    reply = asyncio.run(call(serving_app(), body))
    if reply.status >= 500:
        raise DisagreementError(f"status {reply.status}: {reply.body[:300]!r}")


MODEL = "--model merged --max-new-tokens 1 --greedy"
ASK = f"ask {MODEL} --image photos/page.png What?"
MERGE = "merge --base run/stage1/model --adapter {} --out merged2 --no-probe"
CONVERSE = "ocr converse ocr/read.json --out out.json --model x --base-url http://127.0.0.1:9/v1"
TARGETS: dict[str, Target] = {
    "config": Target(
        "merged photos data language_model", "merged/config.json merged/generation_config.json",
        (ASK, "data inspect data/records.json --images data/images --model merged --limit 1",
         "convert merged out --to hf-llava", "convert merged out --to original",
         "estimate mine.yaml model.language_model= model.vision_tower= model.checkpoint=merged",
         "delta make --base language_model --target merged --out out"), 8,
    ),
    "parts": Target(
        "language_model vision_tower",
        "language_model/*config.json vision_tower/*.json language_model/special*",
        (_build_from_parts, _build_from_parts, "estimate mine.yaml"), 6,
    ),
    "stock": Target(
        "stock photos", "stock/*.json",
        ("ask --model stock --max-new-tokens 1 What?", "convert stock out --to llavar"), 4,
    ),
    "released": Target(
        "delta language_model vision_tower released",
        "delta/*.json released/*.json language_model/*.json",
        ("delta verify --base language_model --delta delta",
         "delta apply --base language_model --delta delta --out out",
         "ask --model released --vision-tower vision_tower --max-new-tokens 1 What?",
         "delta make --base language_model --target released --out out",
         "convert released out --to llavar --vision-tower vision_tower"), 6,
    ),
    "tokenizer": Target(
        "merged photos data",
        "merged/tokenizer.json merged/tokenizer_config.json merged/chat_template.jinja merged/added_tokens.json "
        "merged/special_tokens_map.json",
        (ASK, _apply_template, "data inspect data/records.json --model merged --images data/images --limit 2"), 8,
    ),
    "words": Target("words", "words/*", (_load_words,), 3),
    "processor": Target(
        "merged photos data vision_tower language_model",
        "merged/processor_config.json merged/preprocessor_config.json vision_tower/preprocessor_config.json",
        (ASK, "data inspect data/records.json --images data/images --model merged --limit 1", _build_from_parts), 6,
    ),
    "safetensors": Target(
        "merged", "merged/model.safetensors merged/weights_checksums.json", (_same_as_library, _read_model_weights), 12,
    ),
    "weights": Target(
        "merged photos", "merged/model.safetensors", (ASK, "convert merged out --to hf-llava"), 4,
    ),
    "index": Target(
        "stock", "stock/model.safetensors.index.json", (_read_model_weights, "convert stock out --to llavar"), 8,
    ),
    "bin": Target("delta", "delta/pytorch_model.bin", (_read_model_weights,), 8),
    "adapter": Target(
        "run/adapter run/stage1/model photos", "run/adapter/adapter_*  run/adapter/*.json",
        (_adapter_opinions, "adapter show run/adapter", "adapter verify run/adapter --base run/stage1/model",
         MERGE.format("run/adapter"),
         "ask --model run/stage1/model --adapter run/adapter --max-new-tokens 1 What?"), 16,
    ),
    "bin_adapter": Target(
        "bin_adapter run/stage1/model", "bin_adapter/adapter_*",
        (_adapter_opinions, "adapter show bin_adapter", MERGE.format("bin_adapter")), 4,
    ),
    "projector": Target(
        "projector language_model vision_tower", "projector/*",
        (_read_model_weights, _read_model_weights, _build_from_parts), 4,
    ),
    "records": Target(
        "data merged ocr", "data/records.json ocr/read.json",
        ("data check data/records.json --images data/images", "data check ocr/read.json --images data/images",
         "data inspect data/records.json --images data/images --model merged",
         "eval diagnose --records data/records.json --model merged --images data/images --json",
         "eval vqa --predictions results.answers.jsonl --dataset labelled.json --heights ocr/read.json"), 8,
    ),
    "messages": Target(
        "data merged", "data/messages.json data/messages.jsonl",
        ("data check data/messages.json --images data/images", "data check data/messages.jsonl --images data/images",
         "data inspect data/messages.json --images data/images --model merged", _estimate_messages), 8,
    ),
    "parquet": Target(
        "tables merged", "tables/*.parquet tables/saved/* tables/folder/*",
        ("data check tables/messages.parquet", "data inspect tables/conversations.parquet --model merged",
         "data check tables/conversations.parquet", "data check tables/saved", "data check tables/folder",
         _estimate_tables), 8,
    ),
    "rows": Target(
        "tables photos", "tables/rows.*",
        ("data check tables/rows.csv --images photos", "data check tables/rows.tsv --images photos",
         "data check tables/rows.jsonl --images photos", _estimate_rows), 8,
    ),
    "questions": Target(
        "merged data questions.jsonl answers.jsonl", "questions.jsonl answers.jsonl",
        (f"generate {MODEL} --questions questions.jsonl --images data/images --answers answers.jsonl",), 4,
    ),
    "results": Target(
        "results.json results.answers.jsonl labelled.json data run judge",
        "results.json results.answers.jsonl labelled.json judge/reviews.jsonl judge/mme.txt",
        ("eval compare results.json results.json", "eval diagnose results.json", "eval summarize judge/reviews.jsonl",
         "eval vqa --predictions results.answers.jsonl --dataset labelled.json", "eval mme --answers judge/mme.txt",
         "report --results results.json --images data/images --reviews judge/reviews.jsonl --out page.html"), 12,
    ),
    "heights": Target(
        "letters.heights.json", "letters.heights.json", ("report --heights letters.heights.json --out page.html",), 3,
    ),
    "judge": Target("judge", "judge/*", (_build_cases, "eval summarize judge/reviews.jsonl"), 6),
    "run": Target(
        "run results.json data photos",
        "run/*.json run/recipe.yaml run/stage1/*.json* run/stage2/*.json* run/adapter/base.json run/stage1/probe/*",
        ("report run --images data/images", "ask --model run --max-new-tokens 1 What?"), 6,
    ),
    "resume": Target(
        "interrupted mine.yaml data language_model vision_tower",
        "interrupted/*.json interrupted/recipe.yaml interrupted/stage1/stage.json interrupted/stage2/checkpoint-3/* "
        "interrupted/stage2/*.jsonl",
        ("train mine.yaml output_dir=interrupted stages.1.save_every_steps=50",), 1,
    ),
    "recipe": Target(
        "mine.yaml run/recipe.yaml language_model vision_tower data", "mine.yaml run/recipe.yaml",
        ("recipe show mine.yaml", "recipe show run/recipe.yaml") * 4
        + ("estimate mine.yaml", "estimate run/recipe.yaml"), 6,
    ),
    "ocr": Target(
        "ocr data", "ocr/read.ocr.jsonl ocr/read.report.json",
        (read_images, read_images, "data check data/records.json --images data/images --heights ocr/read.json"), 6,
    ),
    "converse": Target(
        "ocr judge", "ocr/read.json ocr/read.ocr.jsonl judge/captions.jsonl",
        (f"{CONVERSE} --captions judge/captions.jsonl --attempts 1",), 1,
    ),
    "request": Target("merged request.json", "request.json", (_send_request,), 6),
    "image": Target(
        "photos merged", "photos/*",
        (_open_images, _open_images, f"ask {MODEL} --image photos/photo.jpg What?"), 8,
    ),
}  # fmt: skip


def write_request(folder: Path) -> None:
    """Write a valid request of OpenAI's API."""
    image = data_url((folder / "photos/photo.jpg").read_bytes())
    (folder / "request.json").write_bytes(ask_body("What?", image, model="m", max_tokens=2, stream=False))


def split_use(use: Use) -> list[str] | None:
    """Return the arguments of a command line; None for a function."""
    return shlex.split(use) if isinstance(use, str) else None


def choose_uses(target: Target, draw: random.Random) -> list[Use]:
    """Return what reads a case."""
    return [draw.choice(target.uses)]
